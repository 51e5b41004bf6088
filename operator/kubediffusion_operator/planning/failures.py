# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Why a node's pod does not serve, in one word and a sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kubediffusion_operator.planning.conditions import shortened
from kubediffusion_operator.planning.names import is_going, items, name_of, part, status_of
from kubediffusion_operator.planning.types import ModelReport, Object

FAILED_EXIT_CODE = 3  # of a node whose models failed for good
MAX_MESSAGE = 2048

# What a node writes to its termination log: "BadWeights: model.safetensors is torn".
_SAID = re.compile(r"([A-Z][A-Za-z]{2,63}): (\S.*)", re.DOTALL)

# By reason: what to do. Nodes' messages say most of it themselves.
_FIXES = {
    "BadWeights": "fetch or export the weights again",
    "NotSafetensors": "convert the weights to safetensors; pickles are never loaded",
    "WrongArchitecture": "name a source that holds this component of the family",
    "UnsupportedDType": "choose another dtype for the model",
    "SourceNotFound": "check the source's uri, and that its volume is mounted",
    "RevisionNotFound": "check the source's revision",
    "Unauthorized": "give the nodes a token that may read the source (the operator's "
    "hfTokenSecret), and accept the model's licence with its account",
    "Offline": "let the nodes reach the hub, or put the weights on their volume",
    "DiskFull": "give the nodes a larger weights volume",
    "OutOfMemory": "give the node a larger accelerator, choose a smaller dtype, or plan fewer "
    "models on it",
    "OOMKilled": "raise the memory limit under resources.limits",
    "ImagePullBackOff": "check the operator's image and its pull secrets",
    "InvalidImageName": "correct the operator's image",
    "CreateContainerConfigError": "make the Secret or ConfigMap that the pod names",
    "CreateContainerError": "look at the pod's events",
    "Unschedulable": "add nodes with what the pod asks for, or ask for less under resources; a "
    "nodeSelector or toleration goes under podTemplate",
    "Evicted": "ask for what the node needs under resources.requests",
    "Crashed": "see the log of its last run: kubectl logs --previous",
    "Refused": "change what the API server refuses, under podTemplate or resources",
    "QuotaExceeded": "raise the namespace's ResourceQuota, or lower maxReplicas",
    "NotReady": "see the pod's log",
}
_WAITING = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "ErrImageNeverPull": "ImagePullBackOff",
    "RegistryUnavailable": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "CreateContainerError",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure. `time` is when it happened, as the API server wrote it."""

    reason: str
    message: str
    time: str = ""
    exit_code: int | None = None

    def as_status(self, now: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "reason": self.reason,
            "message": self.message,
            "time": self.time or now,
        }
        return entry if self.exit_code is None else entry | {"exitCode": self.exit_code}


def worst(pods: Iterable[Object]) -> Failure | None:
    """The last failure of the pods that do not serve; None where all is well or still starting."""
    found = [failure for pod in pods if (failure := of_pod(pod)) is not None]
    return max(found, key=lambda failure: (failure.time, failure.reason), default=None)


def of_pod(pod: Object) -> Failure | None:
    """Why this pod does not serve. A pod that is ready, going, or just starting has not failed."""
    if is_going(pod) or is_ready(pod):
        return None
    status = status_of(pod)
    name = name_of(pod)
    if status.get("phase") == "Failed" and status.get("reason"):
        return _failure(str(status["reason"]), f"pod {name}: {status.get('message', '')}", pod)
    containers = [
        *items(status, "initContainerStatuses"),
        *items(status, "containerStatuses"),
    ]
    for container in containers:
        failure = _of_container(container, name)
        if failure is not None:
            return failure
    return _unscheduled(status, pod)


def is_ready(pod: Object) -> bool:
    conditions = items(status_of(pod), "conditions")
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def of_deployment(deployment: Object) -> Failure | None:
    """What keeps a Deployment from having its pods at all, or for too long."""
    conditions: Mapping[str, Mapping[str, Any]] = {
        str(c.get("type")): c for c in items(status_of(deployment), "conditions")
    }
    refused = conditions.get("ReplicaFailure", {})
    if refused.get("status") == "True":
        message = str(refused.get("message", ""))
        reason = "QuotaExceeded" if "exceeded quota" in message else "Refused"
        return Failure(
            reason, _with_fix(reason, message), str(refused.get("lastTransitionTime", ""))
        )
    progress = conditions.get("Progressing", {})
    if progress.get("status") == "False" and progress.get("reason") == "ProgressDeadlineExceeded":
        message = f"the pods of {name_of(deployment)} are not ready for too long"
        return Failure(
            "NotReady", _with_fix("NotReady", message), str(progress.get("lastTransitionTime", ""))
        )
    return None


def of_report(report: ModelReport) -> Failure | None:
    """What a node of a pool says of one model."""
    if report.state != "FAILED":
        return None
    reason = report.reason or "LoadFailed"
    return Failure(reason, _with_fix(reason, report.message, said=True))


def _of_container(container: Mapping[str, Any], pod: str) -> Failure | None:
    state = part(container, "state")
    waiting = part(state, "waiting")
    known = _WAITING.get(str(waiting.get("reason")))
    if known is not None:
        text = str(waiting.get("message") or waiting["reason"])
        return Failure(known, _with_fix(known, f"pod {pod}: {text}"))
    # Between two tries it waits or runs; what ended the last one is why it is not ready.
    ended = part(state, "terminated") or part(part(container, "lastState"), "terminated")
    return _ended(ended, pod) if ended.get("exitCode") else None


def _ended(ended: Mapping[str, Any], pod: str) -> Failure:
    code, time = int(ended["exitCode"]), str(ended.get("finishedAt") or "")
    said = str(ended.get("message") or "").strip()
    if ended.get("reason") == "OOMKilled":
        text = f"pod {pod}: the kernel ended it for taking more memory than its limit"
        return Failure("OOMKilled", _with_fix("OOMKilled", text), time, code)
    match = _SAID.fullmatch(said)
    if match is not None and (code == FAILED_EXIT_CODE or match[1] in _FIXES):
        return Failure(match[1], _with_fix(match[1], match[2], said=True), time, code)
    last_line = said.splitlines()[-1] if said else ""
    text = f"pod {pod} ended with exit code {code}" + (f": {last_line}" if last_line else "")
    return Failure("Crashed", _with_fix("Crashed", text), time, code)


def _unscheduled(status: Mapping[str, Any], pod: Object) -> Failure | None:
    for condition in items(status, "conditions"):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            if condition.get("reason") != "Unschedulable":
                return None
            text = f"pod {name_of(pod)}: {condition.get('message', '')}"
            return Failure(
                "Unschedulable",
                _with_fix("Unschedulable", text),
                str(condition.get("lastTransitionTime") or ""),
            )
    return None


def _failure(reason: str, message: str, pod: Object) -> Failure:
    started = status_of(pod).get("startTime") or pod["metadata"].get("creationTimestamp") or ""
    reason = re.sub(r"[^A-Za-z0-9]", "", reason)[:64] or "Failed"
    return Failure(reason, _with_fix(reason, message), str(started))


def _with_fix(reason: str, message: str, *, said: bool = False) -> str:
    """What and what to do. A node that `said` it mostly wrote both: "what; what to do"."""
    text = " ".join(message.split()).rstrip(".;: ")
    fix = "" if said and ";" in text and reason != "Unauthorized" else _FIXES.get(reason, "")
    return shortened("; ".join(filter(None, (text or reason, fix))), MAX_MESSAGE)
