# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operator as a real process, with an account that may do what docs/operator.md lists."""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.kube import ROOT, ControlPlane, Kube
from tests.cluster.processes import Processes

ACCOUNT = "operator"
PATIENCE = 60.0


def documented_rules() -> list[dict[str, Any]]:
    """The Role in docs/operator.md: what the operator may do in a namespace, and no more."""
    text = (ROOT / "docs/operator.md").read_text()
    found = re.search(r"```yaml\n(# RBAC.*?)```", text, re.DOTALL)
    assert found is not None, "docs/operator.md lists the verbs in a yaml block '# RBAC'"
    return yaml.safe_load(found[1])["rules"]


def authorize(admin: Kube, account: str, home: str, namespace: str = "") -> None:
    """ServiceAccount `account` of `home` gets the rules in one namespace, or in all."""
    group = "rbac.authorization.k8s.io"
    cluster = not namespace
    name = f"{account}-{home}" if cluster else account
    about = {"name": name} if cluster else {"name": name, "namespace": namespace}
    role = {"apiVersion": f"{group}/v1", "kind": "ClusterRole" if cluster else "Role"}
    admin.apply({**role, "metadata": about, "rules": documented_rules()})
    admin.apply(
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding" if cluster else "RoleBinding",
            "metadata": about,
            "roleRef": {"apiGroup": group, "kind": role["kind"], "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": home}],
        }
    )


class OperatorProcess:
    """`kubediffusion-operator` with health and metrics on free ports of 127.0.0.1."""

    def __init__(
        self, folder: Path, plane: ControlPlane, token: str, *, server: str = "", **config: Any
    ) -> None:
        """`server` where it is not the API server itself; `config` over the usual one."""
        self._folder = folder
        self._kubeconfig = plane.kubeconfig(token, server=server)
        self._processes: Processes | None = None
        self._announced = folder / "announced.json"
        self._config = folder / "operator.yaml"
        values = {"image": "example/node:1", "logJson": False, "logLevel": "DEBUG"}
        # So that a second of rest is two rounds of the autoscaler.
        values |= {"scaling": {"intervalSeconds": 0.5}, **config}
        folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text(yaml.safe_dump(values))
        self.starts = 0

    def start(self) -> None:
        self._announced.unlink(missing_ok=True)
        if self._processes is None:
            self._processes = Processes(self._folder)
        words = [sys.executable, "-m", "kubediffusion_operator", "--config", self._config]
        words += ["--kubeconfig", self._kubeconfig, "--host", "127.0.0.1"]
        words += ["--health-port", "0", "--metrics-port", "0"]
        words += ["--announce-path", self._announced]
        self._processes.start("operator", words, {"OMP_NUM_THREADS": "1"})
        self.starts += 1

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.check()
            if self.announced and self.probe("readyz")[0] == 200:
                return
            time.sleep(0.05)
        raise TimeoutError(f"not ready after {timeout:g} s:\n{self.log()}")

    def check(self) -> None:
        assert self._processes is not None, "it was not started"
        self._processes.check()

    @property
    def announced(self) -> bool:
        """Health and metrics are served."""
        return self._announced.exists()

    @property
    def pid(self) -> int:
        assert self._processes is not None, "it was not started"
        return self._processes.pid("operator")

    def kill(self) -> None:
        """-9."""
        if self._processes is not None:
            self._processes.kill("operator")

    def terminate(self, timeout: float = PATIENCE) -> int:
        """SIGTERM; its exit code."""
        assert self._processes is not None, "it was not started"
        process = self._processes._running.pop("operator")
        process.terminate()
        return process.wait(timeout)

    def stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()
            self._processes = None

    def probe(self, path: str) -> tuple[int, str]:
        port = json.loads(self._announced.read_text())["health"]
        return _get(f"http://127.0.0.1:{port}/{path}")

    def metric(self, name: str, **labels: str) -> float:
        """Of kubediffusion_operator_NAME; all series that have the labels, added up."""
        port = json.loads(self._announced.read_text())["metrics"]
        _, text = _get(f"http://127.0.0.1:{port}/metrics")
        total = 0.0
        for line in text.splitlines():
            if not line.startswith(f"kubediffusion_operator_{name}"):
                continue
            key, value = line.rsplit(" ", 1)
            series, _, rest = key.partition("{")
            if series != f"kubediffusion_operator_{name}":
                continue
            if all(f'{label}="{wanted}"' in rest for label, wanted in labels.items()):
                total += float(value)
        return total

    def log(self, lines: int = 40) -> str:
        assert self._processes is not None, "it was not started"
        return self._processes.tail("operator", lines)

    @property
    def rss(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def unique(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(3)}"
