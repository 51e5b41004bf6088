# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The whole of it: one namespace in, what to do out.

Workflows give revisions, revisions give models, models and pools give children. Each step looks at
what is there alone, so a plan may be made at any moment and its writes may be cut short anywhere:
the next plan goes on from what has come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeAlias

from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.conditions import unplanned
from kubediffusion_operator.planning.diff import needs_write
from kubediffusion_operator.planning.household import Household, household
from kubediffusion_operator.planning.model_status import model_status, pool_status, twins
from kubediffusion_operator.planning.names import (
    controller_of,
    is_going,
    is_ours,
    items,
    name_of,
    pool_child,
    ref_of,
    status_of,
    uid_of,
)
from kubediffusion_operator.planning.revisions import orphans, surplus
from kubediffusion_operator.planning.rollout import Rollout
from kubediffusion_operator.planning.scene import Scene, gather
from kubediffusion_operator.planning.types import (
    EventRecord,
    Object,
    Objects,
    Observed,
    Plan,
    Ref,
    ScaleWrite,
)
from kubediffusion_operator.planning.workflow_status import workflow_status

# A node that loads is asked again after so many seconds.
POLL_SECONDS = 2.0
# Kinds in the order of their writing: what names another comes after it.
_ORDER = (
    "ControllerRevision",
    "DiffusionModel",
    "ConfigMap",
    "Service",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Deployment",
)
# A status, and the events that come with it.
Told: TypeAlias = tuple[Object, list[EventRecord]]
# What a status holds that others write: the autoscaler.
_THEIRS = frozenset({"scalingHistory"})
_THEIR_CONDITIONS = frozenset({"MetricsAvailable", "ScalingActive"})


def plan(observed: Observed, cache: PlanCache | None = None) -> Plan:
    """What to do in a namespace; nothing where all is as it should be.

    An object that cannot be planned gets a condition, and the others their plan all the same.
    """
    cache = PlanCache() if cache is None else cache
    scene = gather(observed, cache)
    made = household(scene, cache)
    result = Plan()
    _write(result, scene, made, cache)
    _remove(result, scene, made)
    _tell(result, scene)
    _residency(result, scene, made)
    result.resolve = [history.workflow for history in scene.histories if history.resolve]
    result.errors = list(scene.errors.values())
    cache.turn()
    return result


def _write(result: Plan, scene: Scene, made: Household, cache: PlanCache) -> None:
    wanted = [history.write for history in scene.histories if history.write is not None]
    wanted += [*scene.wanted.values(), *made.children]
    known = _by_kind(scene.observed)
    needed = [
        each for each in wanted if _needs_write(each, known[each["kind"]].get(name_of(each)), cache)
    ]
    result.apply = sorted(needed, key=lambda each: (_ORDER.index(each["kind"]), name_of(each)))
    result.scale = [
        ScaleWrite(found.name, uid_of(found.model), found.replicas.wanted)
        for name, found in scene.standings.items()
        if found.replicas.asked is None
        and found.named_right
        and not found.helper
        and name not in scene.unwanted
    ]


def _needs_write(wanted: Object, found: Object | None, cache: PlanCache) -> bool:
    """An object that is going has to be gone first; a watch will tell."""
    if found is None:
        return True
    if is_going(found):
        return False
    # The object and what is wanted of it are the same as in the plan before, mostly.
    version = found["metadata"].get("resourceVersion")
    if version is None:
        return needs_write(wanted, found)
    key = ("needs", wanted["kind"], uid_of(found), version, _stamp(wanted))
    return cache.get(key, lambda: needs_write(wanted, found))


def _stamp(wanted: Object) -> str:
    return next(iter(wanted["metadata"]["annotations"].values()))


def _by_kind(observed: Observed) -> Mapping[str, Objects]:
    return {
        "ControllerRevision": observed.revisions,
        "DiffusionModel": observed.models,
        "Deployment": observed.deployments,
        "Service": observed.services,
        "PodDisruptionBudget": observed.pdbs,
        "NetworkPolicy": observed.networkpolicies,
        "ConfigMap": observed.configmaps,
    }


def _remove(result: Plan, scene: Scene, made: Household) -> None:
    observed = scene.observed
    gone: list[Ref] = [ref_of(model) for model in scene.unwanted.values()]
    for rollout in scene.rollouts:
        in_use = frozenset(known.revision.name for known in rollout.in_use)
        gone += surplus(rollout.history, in_use)
    gone += orphans(observed)
    owners = {uid_of(owner) for owner in (*observed.models.values(), *observed.pools.values())}
    going = {ref.uid for ref in gone}
    kept = {(child["kind"], name_of(child)) for child in made.children}
    left_alone = made.kept | _unplanned(scene)
    for objects in _children(observed):
        for found in objects.values():
            owner = controller_of(found)
            # The garbage collector takes the children of what is gone.
            collected = bool(owner) and (owner not in owners or owner in going)
            if (found["kind"], name_of(found)) in kept or name_of(found) in left_alone:
                continue
            if collected:
                continue
            if is_ours(found) and not is_going(found):
                gone.append(ref_of(found))
    result.delete = gone


def _unplanned(scene: Scene) -> set[str]:
    """Names of the children of models and pools that cannot be planned."""
    own = {name for kind, name in scene.errors if kind == "DiffusionModel"}
    return own | {pool_child(name) for kind, name in scene.errors if kind == "ModelPool"}


def _children(observed: Observed) -> list[Objects]:
    return [
        observed.deployments,
        observed.services,
        observed.pdbs,
        observed.networkpolicies,
        observed.configmaps,
    ]


def _tell(result: Plan, scene: Scene) -> None:
    """Statuses that say something new, and their events."""
    for about, make in _statuses(scene):
        known = _ours_of(status_of(about))
        key = about["kind"], name_of(about)
        made = scene.guarded(about, make) if key not in scene.errors else None
        if made is None:
            made = unplanned(about, known, scene.errors[key].message, scene.observed.now)
        status, events = made
        if known != status:
            result.status[key] = status
            result.events += events


def _statuses(scene: Scene) -> Iterator[tuple[Object, Callable[[], Told]]]:
    """What there is to say of each object."""
    observed, now = scene.observed, scene.observed.now
    for rollout in scene.rollouts:
        workflow = rollout.history.workflow
        yield workflow, partial(_of_workflow, scene, rollout)
    equal = twins(scene.standings)
    for name, found in scene.standings.items():
        users = scene.shared[name].users if name in scene.shared else []
        yield found.model, partial(model_status, found, users, equal.get(name, ""), now)
    for name, each in scene.pools.items():
        yield each.pool, partial(pool_status, each, scene.bad_pools.get(name), observed)
    planned = {name_of(rollout.history.workflow) for rollout in scene.rollouts}
    for kind, name in scene.errors:
        objects, known = {
            "DiffusionWorkflow": (observed.workflows, planned),
            "DiffusionModel": (observed.models, scene.standings),
            "ModelPool": (observed.pools, scene.pools),
        }[kind]
        if name not in known:
            yield objects[name], _nothing


def _nothing() -> Told:
    raise AssertionError("nobody asks for more than the error of what has one")


def _of_workflow(scene: Scene, rollout: Rollout) -> Told:
    observed = scene.observed
    return workflow_status(
        rollout,
        scene.standings,
        scene.conflicts.get(name_of(rollout.history.workflow), ()),
        observed.config,
        observed.namespace,
        observed.now,
    )


def _ours_of(status: Mapping[str, object]) -> dict[str, object]:
    """A status without what others write in it."""
    ours = {key: value for key, value in status.items() if key not in _THEIRS}
    conditions = items(status, "conditions")
    if conditions:
        ours["conditions"] = sorted(
            (each for each in conditions if each.get("type") not in _THEIR_CONDITIONS),
            key=lambda each: str(each.get("type")),
        )
    return ours


def _residency(result: Plan, scene: Scene, made: Household) -> None:
    result.residency, result.looks = made.residency, made.looks
    waits = [POLL_SECONDS] if made.residency else []
    waits += made.retries
    waits += [r.remaining for r in scene.rollouts if r.remaining is not None]
    waits += [each.retry_in for each in scene.pools.values() if each.retry_in is not None]
    result.requeue_after = min(waits, default=None)
