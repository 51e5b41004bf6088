# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Says of every pod of a namespace that it runs: no container does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx

from tests.cluster.kube import ApiError, Kube, Object
from tests.cluster.operator.fake_node import ADDRESS

# What a pod's status is to be; None: leave it alone.
Verdict = Callable[[Object], Object | None]


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def running(pod: Object) -> Object:
    """A status as kubelet writes it once every container is ready."""
    now = stamp()
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": now}
        for kind in ("Initialized", "PodScheduled", "ContainersReady", "Ready")
    ]
    container = pod["spec"]["containers"][0]
    return {
        "phase": "Running",
        "podIP": ADDRESS,
        "podIPs": [{"ip": ADDRESS}],
        "startTime": now,
        "conditions": conditions,
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "containerID": "none://1",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
        ],
    }


def waiting(reason: str, message: str, last: Object | None = None, restarts: int = 0) -> Verdict:
    """The container waits for `reason`; `last` is how it ended before, as lastState."""

    def verdict(pod: Object) -> Object:
        now = stamp()
        container = pod["spec"]["containers"][0]
        return {
            "phase": "Pending" if last is None else "Running",
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
                {"type": "Ready", "status": "False", "lastTransitionTime": now},
            ],
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": "",
                    "ready": False,
                    "started": False,
                    "restartCount": restarts,
                    "state": {"waiting": {"reason": reason, "message": message}},
                    "lastState": last or {},
                }
            ],
        }

    return verdict


class FakeKubelet:
    """A context manager; `verdict` may be changed while it runs, and holds for pods to come."""

    def __init__(self, kube: Kube, verdict: Verdict = running, namespace: str | None = None):
        self.verdict = verdict
        self._kube = kube
        self._namespace = namespace
        self._done: dict[str, Verdict] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeKubelet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            try:
                for pod in self._kube.list("Pod", self._namespace):
                    self._see(pod)
            except (ApiError, httpx.TransportError):
                continue  # the API server is away, or the pod is

    def _see(self, pod: Object) -> None:
        meta: Any = pod["metadata"]
        verdict = self.verdict
        if meta.get("deletionTimestamp") or self._done.get(meta["uid"]) is verdict:
            return
        status = verdict(pod)
        if status is not None:
            patch = {"status": status}
            self._kube.patch(
                "Pod",
                meta["name"],
                patch,
                meta["namespace"],
                subresource="status",
                how="merge",
            )
        self._done[meta["uid"]] = verdict
