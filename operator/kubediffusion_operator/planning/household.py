# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The children that models and pools should have, and what their nodes have to be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.children import Nodes, children, downloads
from kubediffusion_operator.planning.diff import digest
from kubediffusion_operator.planning.failures import Failure
from kubediffusion_operator.planning.models import drain_seconds, pool_of
from kubediffusion_operator.planning.names import (
    generation_of,
    model_labels,
    name_of,
    pool_child,
    pool_labels,
    uid_of,
)
from kubediffusion_operator.planning.pods import room_of
from kubediffusion_operator.planning.podtemplate import BadFragmentError
from kubediffusion_operator.planning.pools import PoolPlan
from kubediffusion_operator.planning.residency import look_at, own_content, report_of, write_to
from kubediffusion_operator.planning.scene import Scene, is_held
from kubediffusion_operator.planning.standing import Standing, child
from kubediffusion_operator.planning.types import Object, ResidencyWrite


@dataclass
class Household:
    """`kept` are names of children that stay as they are, because what to make of them cannot be
    said."""

    children: list[Object] = field(default_factory=list[Object])
    kept: set[str] = field(default_factory=set[str])
    residency: list[ResidencyWrite] = field(default_factory=list[ResidencyWrite])
    looks: list[ResidencyWrite] = field(default_factory=list[ResidencyWrite])
    # Seconds until models that nodes could not load are tried again.
    retries: list[float] = field(default_factory=list[float])


def household(scene: Scene, cache: PlanCache) -> Household:
    made = Household()
    for name, found in scene.standings.items():
        if name in scene.unwanted or not found.named_right or found.helper:
            continue
        if pool_of(found.model) and not _moves(scene, found):
            continue
        if scene.guarded(found.model, lambda f=found: _alone(made, scene, f, cache)) is None:
            made.kept.add(name)
    for name, plan in scene.pools.items():
        if scene.guarded(plan.pool, lambda p=plan: _pool(made, scene, p, cache)) is None:
            made.kept.add(pool_child(name))
    return made


def _moves(scene: Scene, found: Standing) -> bool:
    """Into a pool, from nodes of its own: these serve until the pool does."""
    own = child(found.model, found.name, scene.observed.deployments)
    return own is not None and not found.ready


def _alone(made: Household, scene: Scene, found: Standing, cache: PlanCache) -> bool:
    observed, model, name = scene.observed, found.model, found.name
    pods = scene.pods.get(name, ())
    reports = [r for pod in pods if (r := report_of(pod, observed.residency)) is not None]
    configmap = child(model, name, observed.configmaps)
    helpers = scene.hosting.helpers.get(name, ())
    told = own_content(model, helpers, configmap, reports, observed.now)
    nodes = Nodes(
        owner=model,
        name=name,
        labels=model_labels(name),
        replicas=0 if name in scene.retiring else found.replicas.wanted,
        drain_seconds=drain_seconds(model),
        recreate=name in scene.shared and scene.shared[name].replace,
        downloads=any(downloads(each) for each in (model, *helpers)),
        content=told.content,
        since=told.since,
        helpers=helpers,
    )
    objects = _children(made, scene, nodes, cache, found)
    if is_held(scene, name):
        objects = [each for each in objects if each["kind"] != "Deployment"]
        found.reason = "WaitingForOldModels"
        found.message = "the workflow's strategy is Replace: the old models' pods go first"
    made.children += objects
    made.retries += [told.retry_in] if told.retry_in is not None else []
    room = next((room_of(_template(each)) for each in objects if each["kind"] == "Deployment"), "")
    for pod in pods:
        # One without the memory for all of them goes when another has come in its place.
        if room_of(pod) == room:
            watched = not scene.watched.isdisjoint((name, *map(name_of, helpers)))
            _tell(made, scene, pod, told.content, watched=watched)
    return True


def _template(deployment: Object) -> Object:
    return deployment["spec"]["template"]


def _tell(
    made: Household, scene: Scene, pod: Object, content: Mapping[str, Any], *, watched: bool
) -> None:
    """What it was not told yet; where its tasks are waited for, what it knows once more."""
    write = write_to(pod, content, scene.observed.residency)
    if write is not None:
        made.residency.append(write)
    elif watched and (look := look_at(pod, content)) is not None:
        made.looks.append(look)


def _children(
    made: Household, scene: Scene, nodes: Nodes, cache: PlanCache, found: Standing | None
) -> list[Object]:
    owner = nodes.owner
    key = (
        "children",
        uid_of(owner),
        generation_of(owner),
        nodes.replicas,
        nodes.recreate,
        digest(nodes.content),
        nodes.since,
        digest([each["spec"].get("resources") for each in nodes.helpers]),
    )
    try:
        return cache.get(key, lambda: children(nodes, scene.observed.config))
    except BadFragmentError as error:
        made.kept.add(nodes.name)
        failure = Failure("InvalidPodTemplate", f"{error}; correct it")
        if found is not None:
            found.failure = failure
            found.settle()
        else:
            scene.bad_pools[name_of(owner)] = failure
        return []


def _pool(made: Household, scene: Scene, plan: PoolPlan, cache: PlanCache) -> bool:
    pool = plan.pool
    nodes = Nodes(
        owner=pool,
        name=pool_child(name_of(pool)),
        labels=pool_labels(name_of(pool)),
        replicas=int(pool["spec"].get("replicas", 1)),
        drain_seconds=drain_seconds(pool),
        memory_limit=plan.memory_limit,
    )
    made.children += _children(made, scene, nodes, cache, None)
    for name, pod in plan.nodes.items():
        watched = not scene.watched.isdisjoint(plan.hosts(name))
        _tell(made, scene, pod, plan.content(name), watched=watched)
    return True
