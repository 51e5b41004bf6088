# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What nodes are told, and which of them have to be told (again)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from kubediffusion.workflow import LoraDecl
from kubediffusion_operator.planning.children import content_in, since_in
from kubediffusion_operator.planning.models import node_spec
from kubediffusion_operator.planning.names import (
    CONTAINER,
    GRPC_PORT,
    PLANNER,
    generation_of,
    is_going,
    items,
    name_of,
    part,
    status_of,
    uid_of,
)
from kubediffusion_operator.planning.types import (
    LoraKey,
    ModelReport,
    Object,
    ResidencyReport,
    ResidencyWrite,
)

# Nodes try a model that failed again when a new plan comes; so often a new one is made for it.
RETRY_SECONDS = 600
# A node that waits so does not come back by itself soon.
_STUCK = frozenset({"CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull"})


@dataclass(frozen=True, slots=True)
class Told:
    """The plan of a model's own nodes. `since` is when it became so, where that is kept;
    `retry_in` the seconds until what failed of it is tried again."""

    content: dict[str, Any]
    since: str = ""
    retry_in: float | None = None


def own_content(
    model: Object,
    helpers: Sequence[Object],
    configmap: Object | None,
    reports: Sequence[ResidencyReport],
    now: str,
) -> Told:
    """That model, and those that help it, alone.

    What its ConfigMap says stays while it is true. Another content gets the model's generation,
    which has counted the change, or a higher one where more has been told already (the model was
    deleted and made again, say). A node whose own model failed ends and starts again; for a helper
    that failed, nodes get the same plan as a new one after a while.
    """
    models = [node_spec(model), *(node_spec(helper) for helper in helpers)]
    before, since = content_in(configmap) or {}, since_in(configmap)
    told = int(before.get("generation") or 0)
    seen = max((report.generation for report in reports), default=0)
    names = {name_of(helper) for helper in helpers}
    failed = any(said.identity in names and said.state == "FAILED" for said in _all(reports))
    left = RETRY_SECONDS - seconds_between(since, now) if failed else None
    # With anything more in it, it is a newer operator's.
    same = before == {
        "generation": before.get("generation"),
        "planner": PLANNER,
        "models": models,
    }
    if same and told >= seen and (left is None or left > 0):
        return Told(before, since if helpers else "", left)
    generation = max(generation_of(model), told + 1 if told else 0, seen + 1 if seen else 0)
    content = {"generation": str(generation), "planner": PLANNER, "models": models}
    return Told(content, now if helpers else "")


def _all(reports: Iterable[ResidencyReport]) -> Iterable[ModelReport]:
    return (said for report in reports for said in report.models)


def report_of(pod: Object, residency: Mapping[str, ResidencyReport]) -> ResidencyReport | None:
    """What the pod said in its present life."""
    report = residency.get(uid_of(pod))
    return report if report is not None and report.restarts == restarts_of(pod) else None


def write_to(
    pod: Object, content: Mapping[str, Any], residency: Mapping[str, ResidencyReport]
) -> ResidencyWrite | None:
    """What to tell the pod; None where it cannot hear, or has done it all."""
    if not is_running(pod):
        return None
    report = report_of(pod, residency)
    if is_done(content, report):
        return None
    return _write(pod, content)


def look_at(pod: Object, content: Mapping[str, Any]) -> ResidencyWrite | None:
    """What the pod knows already: its answer says what it does now. None where it cannot hear."""
    return _write(pod, content) if is_running(pod) else None


def _write(pod: Object, content: Mapping[str, Any]) -> ResidencyWrite:
    return ResidencyWrite(
        pod=name_of(pod),
        uid=uid_of(pod),
        restarts=restarts_of(pod),
        address=f"{status_of(pod)['podIP']}:{GRPC_PORT}",
        content=content,
    )


def key_of(lora: LoraDecl) -> LoraKey:
    return lora.name, lora.uri, lora.revision, lora.subfolder, lora.weight_name


def loras_in(spec: Mapping[str, Any]) -> frozenset[LoraKey]:
    """Of a model in what a node is told: node.proto's ModelSpec in protobuf's JSON."""
    fields = ("name", "uri", "revision", "subfolder", "weightName")
    return frozenset(
        cast(LoraKey, tuple(str(lora.get(name, "")) for name in fields))
        for lora in items(spec, "loras")
    )


def is_done(content: Mapping[str, Any], report: ResidencyReport | None) -> bool:
    """The node has loaded what it was told, or has failed to."""
    if report is None or report.error or report.generation != int(content["generation"]):
        return False
    wanted = {model["identity"] for model in content["models"]}
    states = {each.identity: each.state for each in report.models}
    return set(states) == wanted and set(states.values()) <= {"READY", "FAILED"}


def is_running(pod: Object) -> bool:
    """Its node may listen."""
    state = part(_container(pod), "state")
    return bool(status_of(pod).get("podIP")) and not is_going(pod) and "running" in state


def is_usable(pod: Object, *, hosting: bool) -> bool:
    """Models can be planned on it. One that hosts some keeps them while its node restarts."""
    if is_running(pod):
        return True
    state = part(_container(pod), "state")
    waiting = part(state, "waiting")
    stuck = waiting.get("reason") in _STUCK or status_of(pod).get("phase") in (
        "Failed",
        "Succeeded",
    )
    return hosting and not stuck and not is_going(pod) and bool(status_of(pod).get("podIP"))


def takes_requests(pod: Object) -> bool:
    """Its node has something to serve, as its readiness probe found."""
    conditions = items(status_of(pod), "conditions")
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def restarts_of(pod: Object) -> int:
    return int(_container(pod).get("restartCount") or 0)


def _container(pod: Object) -> Mapping[str, Any]:
    statuses: Sequence[Mapping[str, Any]] = items(status_of(pod), "containerStatuses")
    none: Mapping[str, Any] = {}
    return next((each for each in statuses if each.get("name") == CONTAINER), none)


def seconds_between(before: str, now: str) -> float:
    """Of two times as the API server writes them; an empty one is long ago."""
    if not before:
        return float("inf")
    return (datetime.fromisoformat(now) - datetime.fromisoformat(before)).total_seconds()
