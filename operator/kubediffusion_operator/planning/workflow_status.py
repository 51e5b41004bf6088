# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a workflow's status says, and the events that come with its changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning.conditions import Condition, shortened, written
from kubediffusion_operator.planning.draining import as_status
from kubediffusion_operator.planning.hosting import as_used
from kubediffusion_operator.planning.names import generation_of, name_of
from kubediffusion_operator.planning.revisions import Known
from kubediffusion_operator.planning.rollout import Rollout, lacking
from kubediffusion_operator.planning.sharing import Conflict
from kubediffusion_operator.planning.standing import Standing
from kubediffusion_operator.planning.types import EventRecord, Object

MAX_MESSAGE = 1024


def workflow_status(
    rollout: Rollout,
    standings: Mapping[str, Standing],
    conflicts: Sequence[Conflict],
    config: OperatorConfig,
    namespace: str,
    now: str,
) -> tuple[Object, list[EventRecord]]:
    """All of the status, and the events."""
    workflow = rollout.history.workflow
    ready = _ready(rollout, standings)
    progressing = _progressing(rollout, standings)
    degraded = _degraded(rollout, standings)
    wanted = [rollout.history.condition, ready, progressing, degraded]
    if conflicts:
        text = shortened("; ".join(dict.fromkeys(map(str, conflicts))), MAX_MESSAGE)
        shared = any(not each.host for each in conflicts)
        reason = "OldestDecides" if shared else "HostDecides"
        wanted.append(Condition("OverrideConflict", "True", reason, text, "Warning"))
    conditions, events = written(workflow, wanted, now)
    found = as_used(rollout.newest, standings) if rollout.newest is not None else {}
    models = [
        {
            "role": role,
            "model": identity,
            "ready": (used := found[role]) is not None and used.is_ready,
        }
        for role, identity in rollout.roles.items()
    ]
    status: Object = {
        "observedGeneration": generation_of(workflow),
        "ready": f"{sum(1 for each in models if each['ready'])}/{len(models)}" if models else "",
        "reason": _word(ready, progressing, degraded),
        "endpoint": config.gateway.endpoint.replace("{namespace}", namespace),
        "models": models,
        "conditions": conditions,
    }
    return status | _revisions(rollout), events


def _revisions(rollout: Rollout) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if rollout.newest is not None:
        said["latestRevision"] = rollout.newest.revision.name
    if rollout.served is not None:
        said |= {"revision": rollout.served.revision.name, "servedSince": rollout.since}
    if rollout.draining:
        said["previousRevision"] = rollout.draining[0].known.revision.name
        said["draining"] = as_status(rollout.draining)
    return {key: value for key, value in said.items() if value}


def _word(ready: Condition, progressing: Condition, degraded: Condition) -> str:
    """The one that a user should see: why it does not serve, else what is wrong, else Ready."""
    if ready.status != "True":
        return ready.reason
    if degraded.status == "True":
        return degraded.reason
    return progressing.reason if progressing.status == "True" else ready.reason


def _ready(rollout: Rollout, standings: Mapping[str, Standing]) -> Condition:
    """Whether requests are served now: by the revision that gateways serve, not by the newest."""
    if rollout.served is None:
        resolved = rollout.history.condition
        event = "Warning" if resolved.status == "False" else None
        return Condition("Ready", "False", resolved.reason, resolved.message, event)
    missing = _missing(rollout.served, standings)
    if not missing:
        return Condition("Ready", "True", "Ready", "all its models can be used", "Normal")
    role, first = missing[0]
    text = _sentence(role, first)
    if len(missing) > 1:
        text += f" (and {len(missing) - 1} more models are not ready)"
    failed = first is not None and first.failure is not None
    reason = first.reason if first is not None else "Starting"
    return Condition(
        "Ready", "False", reason, shortened(text, MAX_MESSAGE), "Warning" if failed else None
    )


def _progressing(rollout: Rollout, standings: Mapping[str, Standing]) -> Condition:
    newest = rollout.newest
    if newest is not None and not rollout.is_done:
        waits = ", ".join(_waits_for(newest, standings))
        text = f"revision {newest.revision.name} takes over when Ready; it waits for {waits}"
        return Condition("Progressing", "True", "RollingOut", text, "Normal")
    if rollout.draining:
        names = ", ".join(each.known.revision.name for each in rollout.draining)
        text = f"requests that were taken for {names} are ending on the models of then"
        return Condition("Progressing", "True", "Draining", text)
    return Condition("Progressing", "False", "UpToDate", "the newest revision is served")


def _waits_for(newest: Known, standings: Mapping[str, Standing]) -> Iterator[str]:
    """Roles, those that failed first."""
    for role, _ in _missing(newest, standings):
        yield role
    for role, found in sorted(lacking(newest, standings).items()):
        if found is not None and found.is_ready:
            yield f"{role} to know its LoRAs"


def _degraded(rollout: Rollout, standings: Mapping[str, Standing]) -> Condition:
    """Something needs a person, whether or not requests are served."""
    resolved = rollout.history.condition
    if resolved.status == "False":
        return Condition("Degraded", "True", resolved.reason, resolved.message)
    for known in rollout.wanted:
        for role, found in sorted(as_used(known, standings).items()):
            if found is not None and found.failure is not None:
                text = shortened(_sentence(role, found), MAX_MESSAGE)
                return Condition("Degraded", "True", found.failure.reason, text, "Warning")
    return Condition("Degraded", "False", "AsExpected", "")


def _missing(known: Known, standings: Mapping[str, Standing]) -> list[tuple[str, Standing | None]]:
    """Roles that are not ready; those that failed first, because they say what to do."""
    pairs = as_used(known, standings).items()
    missing = [(role, found) for role, found in pairs if found is None or not found.is_ready]
    return sorted(missing, key=lambda each: (_rank(each[1]), each[0]))


def _rank(found: Standing | None) -> int:
    return 0 if found is not None and found.failure is not None else 1


def _sentence(role: str, found: Standing | None) -> str:
    if found is None:
        return f"{role}: its DiffusionModel is being made"
    message = found.failure.message if found.failure is not None else found.message
    return f"{role} ({name_of(found.model)}): {message}"
