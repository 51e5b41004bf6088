# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who is there and how they stand: workflows with their revisions, the models that these want,
pools, and models that nobody wants any more."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.failures import Failure
from kubediffusion_operator.planning.hosting import Hosting, helper_standing, helps, hosted
from kubediffusion_operator.planning.models import node_spec, pool_of, wanted_object
from kubediffusion_operator.planning.names import (
    MODEL,
    POOL,
    is_going,
    is_ours,
    labels_of,
    name_of,
    owners_of,
    ref_of,
    status_of,
    uid_of,
)
from kubediffusion_operator.planning.pools import PoolPlan, planned
from kubediffusion_operator.planning.residency import loras_in
from kubediffusion_operator.planning.revisions import History, by_workflow, history
from kubediffusion_operator.planning.rollout import Rollout, let_end, rolled
from kubediffusion_operator.planning.sharing import Conflict, Shared, shared, unheard
from kubediffusion_operator.planning.standing import Standing, child, standing
from kubediffusion_operator.planning.types import Object, Objects, Observed, PlanningError

T = TypeVar("T")


@dataclass
class Scene:
    """All that is found out about a namespace before anything is decided on children."""

    observed: Observed
    # Pods of models, by the model's name.
    pods: Mapping[str, list[Object]]
    hosting: Hosting = field(default_factory=Hosting)
    pools: dict[str, PoolPlan] = field(default_factory=dict[str, PoolPlan])
    # Of the models that are there, by name.
    standings: dict[str, Standing] = field(default_factory=dict[str, Standing])
    rollouts: list[Rollout] = field(default_factory=list[Rollout])
    # By identity; and the DiffusionModels that the operator wants for them.
    shared: dict[str, Shared] = field(default_factory=dict[str, Shared])
    wanted: dict[str, Object] = field(default_factory=dict[str, Object])
    # Of the operator's models that nobody wants: those to delete, and those whose pods go first.
    unwanted: dict[str, Object] = field(default_factory=dict[str, Object])
    retiring: dict[str, Object] = field(default_factory=dict[str, Object])
    # By workflow: what it says and what does not count.
    conflicts: dict[str, list[Conflict]] = field(default_factory=dict[str, "list[Conflict]"])
    # Pools whose pods cannot be made.
    bad_pools: dict[str, Failure] = field(default_factory=dict[str, Failure])
    # uids of workflows that could not be followed: what they have stays.
    blind: set[str] = field(default_factory=set[str])
    # Models whose nodes have to say what tasks are left.
    watched: set[str] = field(default_factory=set[str])
    # What could not be planned, by (kind, name).
    errors: dict[tuple[str, str], PlanningError] = field(
        default_factory=dict[tuple[str, str], PlanningError]
    )

    @property
    def histories(self) -> list[History]:
        return [rollout.history for rollout in self.rollouts]

    def guarded(self, about: Object, make: Callable[[], T]) -> T | None:
        """An object that nobody foresaw must not stop the others; its condition says so, and what
        it has stays as it is."""
        try:
            return make()
        except Exception as error:
            text = (
                f"this version of the operator cannot plan it ({type(error).__name__}: {error}): "
                "what was there before stays; undo the last change, and please report the "
                "traceback in the operator's log"
            )
            ref = ref_of(about)
            self.errors[ref.kind, ref.name] = PlanningError(ref, text, traceback.format_exc())
            return None


def gather(observed: Observed, cache: PlanCache) -> Scene:
    scene = Scene(observed, _pods_by(MODEL, observed.pods))
    histories = _histories(scene, cache)
    models = _present(observed.models)
    scene.hosting = hosted(histories, models, scene.blind, cache)
    _plan_pools(scene)
    # Models with nodes of their own first: those on these nodes stand as they do.
    for model in sorted(models, key=helps):
        found = scene.guarded(model, lambda model=model: _stand(scene, model, cache))
        if found is not None:
            scene.standings[found.name] = found
    scene.standings = {name: scene.standings[name] for name in sorted(scene.standings)}
    for each in histories:
        found = scene.guarded(
            each.workflow, lambda each=each: rolled(each, scene.standings, observed.now)
        )
        if found is None:
            scene.blind.add(uid_of(each.workflow))
        else:
            scene.rollouts.append(found)
    _drain(scene)
    _share(scene, cache)
    _part(scene)
    return scene


def _histories(scene: Scene, cache: PlanCache) -> list[History]:
    observed, found = scene.observed, list[History]()
    revisions = by_workflow(observed)
    for workflow in _present(observed.workflows):
        known = revisions.get(uid_of(workflow), ())
        each = scene.guarded(
            workflow,
            lambda workflow=workflow, known=known: history(workflow, known, observed, cache),
        )
        if each is None or each.newest is None:
            scene.blind.add(uid_of(workflow))
        if each is not None:
            found.append(each)
    return found


def _drain(scene: Scene) -> None:
    for rollout in scene.rollouts:
        if rollout.draining:
            others = [k for each in scene.rollouts if each is not rollout for k in each.wanted]
            scene.guarded(
                rollout.history.workflow,
                lambda rollout=rollout, others=others: let_end(
                    rollout, others, scene.standings, scene.observed.now
                ),
            )
            scene.watched |= rollout.watched


def is_held(scene: Scene, name: str) -> bool:
    """A model that waits for old ones to go: they and it are one workflow's, which says so."""
    model = scene.shared.get(name)
    if model is None or not model.replace:
        return False
    owner = scene.standings[name].model
    if child(owner, name, scene.observed.deployments) is not None:
        return False
    users = {uid_of(workflow) for workflow in model.workflows}
    if any(users & _owners(old) for old in scene.retiring.values()):
        return True
    # The old ones' last requests are ending: see `draining`.
    return any(
        uid_of(rollout.history.workflow) in users and any(e.going for e in rollout.draining)
        for rollout in scene.rollouts
        if rollout.replace
    )


def _present(objects: Objects) -> list[Object]:
    return [each for each in sorted(objects.values(), key=name_of) if not is_going(each)]


def _pods_by(label: str, pods: Objects) -> Mapping[str, list[Object]]:
    found: dict[str, list[Object]] = {}
    for pod in sorted(pods.values(), key=name_of):
        owner = labels_of(pod).get(label)
        if owner:
            found.setdefault(owner, []).append(pod)
    return found


def _plan_pools(scene: Scene) -> None:
    observed = scene.observed
    members: dict[str, list[Object]] = {}
    for model in _present(observed.models):
        if not helps(model):
            members.setdefault(pool_of(model), []).append(model)
    pods = _pods_by(POOL, observed.pods)
    for pool in _present(observed.pools):
        name = name_of(pool)
        found = scene.guarded(
            pool,
            lambda pool=pool, name=name: planned(
                pool,
                members.get(name, ()),
                pods.get(name, ()),
                observed.residency,
                observed.now,
                scene.hosting.helpers,
            ),
        )
        if found is not None:
            scene.pools[name] = found


def _stand(scene: Scene, model: Object, cache: PlanCache) -> Standing:
    if helps(model):
        hosts = {
            name: scene.standings.get(name) for name in scene.hosting.hosts.get(name_of(model), ())
        }
        return helper_standing(model, hosts, scene.observed, scene.pods, scene.pools, cache)
    pods = scene.pods.get(name_of(model), ())
    return standing(model, scene.observed, pods, scene.pools, cache)


def _share(scene: Scene, cache: PlanCache) -> None:
    """The models that the revisions in use name, each with all its users."""
    wanted = [
        (rollout.history.workflow, known, known is rollout.newest)
        for rollout in scene.rollouts
        for known in rollout.in_use
    ]
    scene.shared = shared(wanted, cache)
    for name, model in scene.shared.items():
        there = scene.observed.models.get(name)
        if there is not None and not is_ours(there):
            lost = unheard(model, loras_in(node_spec(there)))
        else:
            made = scene.guarded(
                model.workflows[0], lambda model=model: wanted_object(model, cache)
            )
            if made is None:
                continue
            scene.wanted[name], lost = made
        for conflict in lost:
            scene.conflicts.setdefault(conflict.workflow, []).append(conflict)


def _part(scene: Scene) -> None:
    """The operator's models that no workflow wants."""
    replacing = {uid_of(r.history.workflow) for r in scene.rollouts if r.replace}
    for model in _present(scene.observed.models):
        name, owners = name_of(model), _owners(model)
        if name in scene.shared or not is_ours(model) or owners & scene.blind:
            continue
        if owners & replacing and _has_pods(scene, model):
            scene.retiring[name] = model
        else:
            scene.unwanted[name] = model


def _owners(model: Object) -> set[str]:
    return {str(owner["uid"]) for owner in owners_of(model)}


def _has_pods(scene: Scene, model: Object) -> bool:
    """Accelerators are still taken, or will be."""
    deployment = child(model, name_of(model), scene.observed.deployments)
    if deployment is not None and deployment["spec"].get("replicas"):
        return True
    return _any_takes(scene.pods.get(name_of(model), ()))


def _any_takes(pods: Iterable[Object]) -> bool:
    return any(status_of(pod).get("phase") not in ("Succeeded", "Failed") for pod in pods)
