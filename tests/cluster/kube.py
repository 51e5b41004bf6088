# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes API for tests: etcd, kube-apiserver and the controllers, as plain processes.

No node runs here: pods stay Pending and tests write their statuses. `ControlPlane` is also what
the real cluster of tests/e2e is built on.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.cluster.pki import authority, certificate, write_kubeconfig
from tests.cluster.processes import Processes, free_ports
from tests.cluster.rest import ApiError, AsyncKube, Kube, Object, condition, is_true

__all__ = ["ApiError", "AsyncKube", "ControlPlane", "Kube", "Object", "condition", "is_true"]

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT / "charts/kubediffusion/crds"

# What makes Deployments, garbage collection, quotas and namespaces real. No node comes, so nothing
# of pods' lives beyond their creation.
CONTROLLERS = (
    "deployment-controller",
    "disruption-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "replicaset-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
)
_SERVER_NAMES = (
    "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,"
    "DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1"
)
# Each write once, when it is done: what `ControlPlane.writes` reads.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
        {"level": "None"},
    ],
}


class NoPrograms(RuntimeError):
    """Kubernetes' programs are not there and cannot be built (no Go)."""


def programs(*tiers: str) -> str:
    """The folders with Kubernetes' programs as a PATH, after building what is missing."""
    script = ROOT / "scripts/cluster/assets"
    done = subprocess.run([script, *tiers], stdout=subprocess.PIPE, text=True)
    if done.returncode == 3:
        raise NoPrograms("Kubernetes' programs cannot be built here; see the words above")
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(tiers)} failed with {done.returncode}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Network:
    """Where the API server is. `address` is also what pods reach it by, if pods there are."""

    address: str = "127.0.0.1"
    services: str = "10.96.0.0/16"
    first_service: str = "10.96.0.1"


class ControlPlane:
    """etcd, kube-apiserver and kube-controller-manager under `folder`, on free ports.

    Starting takes 3 to 6 s and 0.4 GB. All ends with `stop`, or when the tests' process dies.
    """

    def __init__(
        self,
        folder: Path,
        *,
        controllers: Iterable[str] = CONTROLLERS,
        network: Network | None = None,
        tokens: Sequence[tuple[str, str]] = (),
        tiers: Sequence[str] = ("control-plane",),
    ) -> None:
        """`tokens`: (user, group) beside ``admin`` of ``system:masters``; group may be empty.
        `tiers`: what `programs` builds; ``helm`` too, say.
        """
        self.folder, self.network = folder, network or Network()
        self.pki = folder / "pki"
        self.path = programs(*tiers)
        self._controllers = tuple(controllers)
        users = [("admin", "system:masters"), *tokens]
        self.tokens = {user: secrets.token_hex(16) for user, _ in users}
        self._users = users
        self._etcd, self._etcd_peers, self.port = free_ports(3)
        self._audit = folder / "audit.log"
        self.processes: Processes | None = None

    # Life

    def start(self, crds: Path | None = None) -> None:
        """Begin with an empty store. `crds` is a folder of CRDs to have from the first moment on.

        The garbage collector looks for new kinds twice a minute only, so they come before it.
        """
        self.prepare()
        self._start_etcd()
        self.start_apiserver()
        if crds is not None:
            # Refused ones fail the tests that ask for them (fixture `crds`), not all others.
            with contextlib.suppress(ApiError):
                self.apply_crds(crds)
        if self._controllers:
            self.start_controllers()

    def prepare(self) -> None:
        """Write certificates and tokens, so that others may begin too; `start` does it itself."""
        if self.processes is None:
            self._write_files()
            self.processes = Processes(self.folder / "log")

    def stop(self) -> None:
        """Kill all: what they keep is thrown away, and a graceful end takes 8 s."""
        if self.processes is not None:
            self.processes.stop()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def start_apiserver(self, timeout: float = 60.0) -> None:
        """Start it (again) at the same address, and wait until it is ready."""
        self.run("kube-apiserver", self._apiserver_flags())
        self.wait_ready(timeout)

    def stop_apiserver(self) -> None:
        """Kill it at once. etcd keeps what it wrote; controllers and watchers are cut off."""
        self.running.kill("kube-apiserver")

    def start_controllers(self) -> None:
        """Start the controller manager, and wait until it has made a ServiceAccount."""
        self.run("kube-controller-manager", self._controller_flags())
        kube = self.kube()
        kube.wait_for("ServiceAccount", "default", namespace="default", timeout=60.0)
        kube.close()

    def stop_controllers(self) -> None:
        self.running.kill("kube-controller-manager")

    def run(self, name: str, flags: Mapping[str, Any]) -> None:
        """Start one of Kubernetes' programs, which ends with this control plane."""
        words = [f"--{flag}={value}" for flag, value in flags.items()]
        self.running.start(name, [self.program(name), *words])

    def wait_ready(self, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        with httpx.Client(verify=False, trust_env=False) as http:
            while True:
                self.running.check()
                try:
                    if http.get(f"{self.url}/readyz").is_success:
                        return
                except httpx.TransportError:
                    pass
                if time.monotonic() > end:
                    tail = self.running.tail("kube-apiserver")
                    raise TimeoutError(f"no API server after {timeout:g} s:\n{tail}")
                time.sleep(0.05)

    # Use

    @property
    def running(self) -> Processes:
        """Its processes; raises where it was not started."""
        if self.processes is None:
            raise RuntimeError("the control plane was not started")
        return self.processes

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def kube(self, user: str = "admin") -> Kube:
        return Kube(self.url, self.pki / "ca.crt", self.tokens[user])

    def kubeconfig(self, token: str = "", namespace: str = "default", server: str = "") -> Path:
        """A file for kubectl, helm and client libraries; the admin's where no token is given."""
        token = token or self.tokens["admin"]
        path = self.pki / f"{secrets.token_hex(4)}.kubeconfig"
        return write_kubeconfig(path, server or self.url, self.pki / "ca.crt", token, namespace)

    def environment(self, token: str = "", namespace: str = "default") -> dict[str, str]:
        """For a child process: KUBECONFIG, and a PATH with the built programs first."""
        path = f"{self.path}:{os.environ['PATH']}"
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig(token, namespace)), "PATH": path}

    def kubectl(self, *arguments: str, stdin: str = "", token: str = "", check: bool = True) -> str:
        """What kubectl prints, stdout and stderr together. Raises where it fails, unless told."""
        done = subprocess.run(
            [self.program("kubectl"), *arguments],
            input=stdin,
            env=self.environment(token),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)} failed:\n{done.stdout}")
        return done.stdout

    def program(self, name: str) -> str:
        found = shutil.which(name, path=self.path)
        if found is None:
            raise FileNotFoundError(f"no {name} in {self.path}")
        return found

    def apply_crds(self, folder: Path = CRDS) -> list[str]:
        """Apply the CRDs of a folder and wait until they are served. Returns their names.

        Raises ApiError where one was refused, after applying the others.
        """
        kube = self.kube()
        refused: list[ApiError] = []
        names = []
        for file in sorted(folder.glob("*.yaml")):
            try:
                names.append(kube.apply(yaml.safe_load(file.read_text()))["metadata"]["name"])
            except ApiError as error:
                refused.append(error)
        for name in names:
            kube.wait_for("CustomResourceDefinition", name, is_true("Established"))
        kube.close()
        if refused:
            raise refused[0]
        return names

    def token_for(self, account: str, namespace: str) -> str:
        """A token of a ServiceAccount, which must be there."""
        kube = self.kube()
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token = kube.request("POST", path, json=body)["status"]["token"]
        kube.close()
        return token

    # What was written

    def now(self) -> int:
        """A mark for `writes`: how much the audit log holds."""
        return self._audit.stat().st_size if self._audit.exists() else 0

    def writes(self, since: int = 0, user: str = "", agent: str = "") -> list[Object]:
        """Each write since the mark, as audit.k8s.io Events: verb, objectRef, responseStatus, ...

        `user` and `agent` are parts of the user's name and of the user agent; the control plane's
        own writes (leases, ServiceAccounts) are in the list too, so name one of them.
        """
        with self._audit.open("rb") as log:
            log.seek(since)
            events = [json.loads(line) for line in log.read().splitlines()]
        return [
            event
            for event in events
            if user in event["user"].get("username", "") and agent in event.get("userAgent", "")
        ]

    # How

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        authority(self.pki)
        names = f"{_SERVER_NAMES},IP:{self.network.first_service}"
        if self.network.address != "127.0.0.1":
            names += f",IP:{self.network.address}"
        certificate(self.pki, "apiserver", "/CN=kube-apiserver", "serverAuth", names)
        kubelet = "/O=system:masters/CN=kube-apiserver-kubelet-client"
        certificate(self.pki, "kubelet-client", kubelet, "clientAuth")
        rows = [f'{self.tokens[user]},{user},{user},"{group}"' for user, group in self._users]
        (self.pki / "tokens.csv").write_text("\n".join(rows) + "\n")
        (self.folder / "audit.yaml").write_text(json.dumps(_AUDIT_POLICY))

    def _start_etcd(self) -> None:
        clients, peers = (f"http://127.0.0.1:{port}" for port in (self._etcd, self._etcd_peers))
        flags = {
            "data-dir": self.folder / "etcd",
            "unsafe-no-fsync": "true",
            "log-level": "warn",
            "listen-client-urls": clients,
            "advertise-client-urls": clients,
            "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers,
            "initial-cluster": f"default={peers}",
        }
        self.run("etcd", flags)

    def _apiserver_flags(self) -> dict[str, Any]:
        pki, alone = self.pki, self.network.address == "127.0.0.1"
        # A loopback address may not become the endpoint of the Service `kubernetes`.
        reach: dict[str, Any] = (
            {"bind-address": "127.0.0.1", "endpoint-reconciler-type": "none"}
            if alone
            else {"bind-address": "0.0.0.0", "advertise-address": self.network.address}
        )
        return {
            **reach,
            "etcd-servers": f"http://127.0.0.1:{self._etcd}",
            "secure-port": self.port,
            "tls-cert-file": pki / "apiserver.crt",
            "tls-private-key-file": pki / "apiserver.key",
            "client-ca-file": pki / "ca.crt",
            "token-auth-file": pki / "tokens.csv",
            "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
            "service-account-signing-key-file": pki / "sa.key",
            "service-account-key-file": pki / "sa.key",
            "authorization-mode": "Node,RBAC",
            "enable-admission-plugins": "NodeRestriction",
            "service-cluster-ip-range": self.network.services,
            "allow-privileged": "true",
            "kubelet-client-certificate": pki / "kubelet-client.crt",
            "kubelet-client-key": pki / "kubelet-client.key",
            "kubelet-preferred-address-types": "InternalIP",
            "audit-policy-file": self.folder / "audit.yaml",
            "audit-log-path": self._audit,
            "audit-log-maxsize": 2000,
        }

    def _controller_flags(self) -> dict[str, Any]:
        admin = self.kubeconfig()
        return {
            "kubeconfig": admin,
            "controllers": ",".join(self._controllers),
            "leader-elect": "false",
            "service-account-private-key-file": self.pki / "sa.key",
            "root-ca-file": self.pki / "ca.crt",
            "allocate-node-cidrs": "false",
            "service-cluster-ip-range": self.network.services,
            "node-monitor-grace-period": "20s",
            "secure-port": 0,
            # Tests delete and make more in a minute than the default 20 a second allows.
            "kube-api-qps": 500,
            "kube-api-burst": 1000,
        }
