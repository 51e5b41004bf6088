# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes cluster on this machine: containerd, kubelet, pods. Needs root, leaves nothing.

The control plane runs as plain processes (tests/cluster/kube.py), each node in namespaces of its
own (scripts/cluster/node). ``python -m tests.e2e.cluster`` brings one up by hand until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.kube import ROOT, ControlPlane, Kube, Network, Object
from tests.cluster.processes import Processes

SCRIPTS = ROOT / "scripts/cluster"
HERE = Path(__file__).parent
MAX_NODES = 4
# The bridge of scripts/cluster/node.
BRIDGE = "172.31.250.1"
# Where a test may serve a hub: the one port outside of the cluster that NetworkPolicies open.
HUB_PORT = 443
HUB = {"HF_ENDPOINT": f"http://{BRIDGE}:{HUB_PORT}", "HF_HUB_DISABLE_XET": "1"}
# What every node begins with.
SYSTEM_IMAGES = ("pause", "coredns")
OUR_IMAGES = ("control-plane", "prometheus")
ENVIRONMENT = "environment"
ENVIRONMENT_PATH = "/opt/environment"


def state_folder() -> Path:
    """Where images, environments and running clusters lie; kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KUBEDIFFUSION_E2E") or cache / "kubediffusion/e2e")


def why_not() -> str:
    """Why this machine cannot run containers; empty where it can."""
    if os.geteuid() != 0:
        return "not root"
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "mount", "-t", "tmpfs", "x", "/mnt"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"no namespaces or mounts here: {done.stderr.strip()}"
    if shutil.which("apt-get") is None and shutil.which("containerd") is None:
        return "neither containerd nor apt-get to install it with"
    return ""


def build(*images: str) -> None:
    """Make what is missing: Debian packages, images. Says what it does and how long it took."""
    _script("packages")
    _script("image", *SYSTEM_IMAGES, *images)


def image(name: str) -> str:
    """What pods call an image that `build` made."""
    return _script("image", "reference", name)


class Cluster:
    """One cluster; only one fits on a machine. `up`, use, `down`."""

    def __init__(self, folder: Path | None = None, images: Sequence[str] = OUR_IMAGES) -> None:
        self.folder = folder or state_folder() / "run"
        self._images = tuple(images)
        self._nodes: list[int] = []
        self._start = time.monotonic()
        self.plane: ControlPlane
        self.kube: Kube

    # Life

    def up(self, nodes: int = 1) -> None:
        """Control plane, nodes, DNS: 12 to 20 s once all is built. Waits for another's to end."""
        self._lock_machine()
        self.clean()
        build(*self._images)
        node_users = [(f"system:node:node{n}", "system:nodes") for n in range(1, MAX_NODES + 1)]
        self.plane = ControlPlane(
            self.folder / "control-plane",
            controllers=("*",),
            network=Network(BRIDGE),
            tokens=[*node_users, ("system:kube-proxy", "")],
            tiers=("full",),
        )
        self._start = time.monotonic()
        self.plane.prepare()
        self._write_kubeconfigs()
        # Nodes load their images while the API server starts.
        starting = threading.Thread(target=lambda: [self._node_up(n + 1) for n in range(nodes)])
        starting.start()
        self.plane.start()
        self.plane.run(
            "kube-scheduler",
            {"kubeconfig": self.plane.kubeconfig(), "leader-elect": "false", "secure-port": 0},
        )
        self.kube = self.plane.kube()
        self._say("control plane ready")
        starting.join()
        for number in self._nodes:
            self._wait_node(number, images=False)
        self._say(f"{nodes} nodes ready" if nodes > 1 else "node ready")
        self._start_dns()
        self._say("DNS ready")
        for number in self._nodes:
            self._wait_node(number)
        self._say("images loaded")

    def down(self) -> None:
        """Kill everything and remove what would outlive it. Nothing of the cluster is kept."""
        if hasattr(self, "plane"):
            self.plane.stop()
        self.clean()
        self._lock.close()

    def clean(self) -> None:
        """Remove what a cluster left, also one whose tests were killed."""
        self._node("clean")

    def check(self) -> None:
        """Raises AssertionError with all that is left of a cluster on this machine."""
        done = subprocess.run(
            [SCRIPTS / "node", "check"], env=self._environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    # Nodes

    def add_node(self, timeout: float = 60.0) -> str:
        """Another node, Ready. Returns its name."""
        number = next(n for n in range(1, MAX_NODES + 1) if n not in self._nodes)
        self._node_up(number)
        self._wait_node(number, timeout)
        return f"node{number}"

    def cut_power(self, name: str) -> None:
        """The node and its pods are gone at once; its Node object stays, NotReady after 20 s."""
        number = int(name.removeprefix("node"))
        self._node("down", str(number))
        self._nodes.remove(number)

    def remove_node(self, name: str) -> None:
        """As `cut_power`, and an administrator who removes it and its pods from the API too.

        Kubernetes itself would wait a minute for the node to come back.
        """
        self.cut_power(name)
        self.kube.delete("Node", name)
        for pod in self.kube.list("Pod", "*"):
            if pod["spec"].get("nodeName") == name:
                meta = pod["metadata"]
                self.kube.delete("Pod", meta["name"], meta["namespace"], grace_seconds=0)

    def set_gpus(self, name: str, count: int) -> None:
        """Let a node offer `count` of ``nvidia.com/gpu``. Pods get them; nobody looks for them."""
        patch = {"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(count)}
        self.kube.patch("Node", name, [patch], subresource="status", how="json")

        def offered(node: Object) -> bool:
            return node["status"]["allocatable"].get("nvidia.com/gpu") == str(count)

        self.kube.wait_for("Node", name, offered)

    def load(self, *names: str) -> None:
        """Put images that `build` made into all nodes, in place of older ones of that name."""
        tars = [_script("image", "path", name) for name in names]
        for number in self._nodes:
            self._node("load", str(number), *tars)

    def logs(self) -> Path:
        """The folder with all logs: ``control-plane/log`` and ``nodeN/log``."""
        return self.folder

    # Volumes

    def environment_volume(self, namespace: str) -> str:
        """A claim on torch and all that model nodes need, for `node_template`. Returns its name."""
        path = Path(_script("environment"))
        return self.local_volume(namespace, ENVIRONMENT, path, mode="ReadOnlyMany")

    def local_volume(
        self, namespace: str, name: str, path: Path | None = None, mode: str = "ReadWriteMany"
    ) -> str:
        """A claim `name`, bound to a folder of this machine that all nodes see.

        Without `path` the folder is new, empty, and writable for every pod.
        """
        if path is None:
            path = self.folder / "volumes" / namespace / name
            path.mkdir(parents=True)
            path.chmod(0o777)
        size = {"storage": "100Gi"}
        claim = {"namespace": namespace, "name": name}
        anywhere = {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}
        volume = f"{namespace}-{name}"
        affinity = {"required": {"nodeSelectorTerms": [{"matchExpressions": [anywhere]}]}}
        spec = {
            "capacity": size,
            "accessModes": [mode],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": claim,
            "local": {"path": str(path)},
            "nodeAffinity": affinity,
        }
        about = {"apiVersion": "v1", "kind": "PersistentVolume"}
        self.kube.apply({**about, "metadata": {"name": volume}, "spec": spec})
        wanted = {
            "accessModes": [mode],
            "storageClassName": "",
            "volumeName": volume,
            "resources": {"requests": size},
        }
        about = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
        self.kube.apply({**about, "metadata": claim, "spec": wanted})
        return name

    # Tools

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        return self.plane.kubectl(*arguments, stdin=stdin, check=check)

    def helm(self, *arguments: str, check: bool = True) -> str:
        """What helm prints, both its streams. Raises where it fails, unless told."""
        done = subprocess.run(
            [self.plane.program("helm"), *arguments],
            env=self.plane.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"helm {' '.join(arguments)} failed:\n{done.stdout}")
        return done.stdout

    @contextlib.contextmanager
    def stopped_apiserver(self) -> Iterator[None]:
        """Within, nobody answers; afterwards it is ready again."""
        self.plane.stop_apiserver()
        try:
            yield
        finally:
            self.plane.start_apiserver()

    # How

    def _lock_machine(self) -> None:
        """Two clusters would have the same addresses. The lock goes with this process."""
        state_folder().mkdir(parents=True, exist_ok=True)
        self._lock = (state_folder() / "cluster.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("==> another cluster runs on this machine; waiting for its end", flush=True)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _node_up(self, number: int) -> None:
        self._nodes.append(number)
        # In the control plane's process group: whatever kills the tests ends the node too.
        self._node("up", str(number), group=self.plane.running)

    def _wait_node(self, number: int, timeout: float = 60.0, images: bool = True) -> None:
        def ready(node: Object) -> bool:
            conditions = node["status"].get("conditions", ())
            return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

        self.kube.wait_for("Node", f"node{number}", ready, timeout=timeout)
        if images:
            self._node("wait", str(number))

    def _start_dns(self) -> None:
        text = (HERE / "images/coredns.yaml").read_text().replace("IMAGE", image("coredns"))
        for body in yaml.safe_load_all(text):
            self.kube.apply(body)

        def available(deployment: Object) -> bool:
            return deployment.get("status", {}).get("availableReplicas") == 1

        self.kube.wait_for("Deployment", "coredns", available, "kube-system", timeout=60.0)

    def _write_kubeconfigs(self) -> None:
        """Names that scripts/cluster/node knows."""
        server = f"https://{BRIDGE}:{self.plane.port}"
        users = {f"node{n}": f"system:node:node{n}" for n in range(1, MAX_NODES + 1)}
        for name, user in {**users, "kube-proxy": "system:kube-proxy"}.items():
            path = self.plane.kubeconfig(self.plane.tokens[user], server=server)
            path.rename(self.plane.pki / f"{name}.kubeconfig")

    def _environment(self) -> dict[str, str]:
        extra = {"RUN": str(self.folder)}
        if hasattr(self, "plane"):
            tars = [_script("image", "path", name) for name in (*SYSTEM_IMAGES, *self._images)]
            extra |= {"BIN": self.plane.path, "PKI": str(self.plane.pki), "IMAGES": "\n".join(tars)}
        return {**os.environ, **extra}

    def _node(self, *arguments: str, group: Processes | None = None) -> None:
        done = subprocess.run(
            [SCRIPTS / "node", *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            process_group=group.group if group else None,
        )
        if done.returncode:
            raise RuntimeError(f"node {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")

    def _say(self, what: str) -> None:
        print(f"==> {time.monotonic() - self._start:.1f} s: {what}", flush=True)


def node_template() -> dict[str, Any]:
    """A podTemplate for the chart's `nodes`: the claim of `environment_volume` on sys.path.

    The image is the control plane's, which has all of our code and no torch.
    """
    mount = {"name": ENVIRONMENT, "mountPath": ENVIRONMENT_PATH, "readOnly": True}
    claim = {"claimName": ENVIRONMENT, "readOnly": True}
    container = {
        "name": "node",
        "env": variables({"PYTHONPATH": ENVIRONMENT_PATH, "OMP_NUM_THREADS": "1", **HUB}),
        "volumeMounts": [mount],
    }
    volume = {"name": ENVIRONMENT, "persistentVolumeClaim": claim}
    return {"spec": {"containers": [container], "volumes": [volume]}}


def variables(values: Mapping[str, str]) -> list[dict[str, str]]:
    """As a container's `env`."""
    return [{"name": name, "value": value} for name, value in values.items()]


def _script(name: str, *arguments: str) -> str:
    """What a script of scripts/cluster prints; its progress goes to our stderr."""
    done = subprocess.run([SCRIPTS / name, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed with {done.returncode}")
    return done.stdout.strip()


def main() -> None:
    """A Kubernetes cluster on this machine, until Ctrl-C."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"this machine cannot run containers: {reason}")
    cluster = Cluster()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.up(arguments.nodes)
        print(f"export KUBECONFIG={cluster.plane.kubeconfig()} PATH={cluster.plane.path}:$PATH")
        print("Ctrl-C ends the cluster", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.down()
        cluster.check()


if __name__ == "__main__":
    main()
