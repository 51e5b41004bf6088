# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a namespace: it settles, and holds exactly what it should."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kubediffusion_operator.planning import Observed, PlanCache, plan
from kubediffusion_operator.planning.types import Plan, ResolutionError
from tests.unit.planning.world import FIELDS, World, summary

NAMES = ("a", "b", "c")
SOURCES = ("base", "tuned")
CHILDREN = ("ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment")

SCALING = st.builds(
    lambda low, more, mode: {"minReplicas": low, "maxReplicas": max(1, low + more), "mode": mode},
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(["builtin", "external"]),
)
OVERRIDE = st.fixed_dictionaries(
    {},
    optional={
        "scaling": SCALING,
        "drainSeconds": st.integers(0, 90),
        "placement": st.just({"pool": "p"}),
        "source": st.sampled_from(SOURCES).map(
            lambda name: {"uri": f"hf://org/{name}", "subfolder": "t"}
        ),
    },
)
WORKFLOW = st.fixed_dictionaries(
    {"model": st.sampled_from(SOURCES), "strategy": st.sampled_from(["Rolling", "Replace"])},
    optional={
        "models": st.dictionaries(
            st.sampled_from(["transformer", "vae", "text_encoder"]), OVERRIDE, max_size=2
        ),
        "loras": st.lists(
            st.sampled_from(["ink", "wash"]).map(
                lambda name: {"name": name, "source": {"uri": f"hf://org/{name}"}}
            ),
            unique_by=lambda lora: lora["name"],
            max_size=2,
        ),
        "controlNets": st.lists(
            st.sampled_from(["edges", "depth"]).map(
                lambda name: {"name": name, "source": {"uri": f"hf://org/{name}"}}
            ),
            unique_by=lambda controlnet: controlnet["name"],
            max_size=2,
        ),
        "revisionHistoryLimit": st.integers(0, 2),
    },
)
STEP = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from(NAMES), WORKFLOW),
    st.tuples(st.just("delete"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("break"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("repair"), st.none(), st.none()),
    st.tuples(st.just("pool"), st.none(), st.integers(0, 2)),
    st.tuples(st.just("no pool"), st.none(), st.none()),
    st.tuples(st.just("drift"), st.integers(0, 99), st.integers(0, 2)),
    st.tuples(st.just("some"), st.none(), st.integers(0, 20)),
    st.tuples(st.just("round"), st.none(), st.none()),
    st.tuples(st.just("wait"), st.none(), st.integers(1, 200)),
)
STEPS = st.lists(STEP, min_size=1, max_size=12)
thorough = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def take(world: World, step: tuple[str, Any, Any]) -> None:
    match step:
        case "apply", name, spec:
            world.workflow(name, **copy.deepcopy(spec))
        case "delete", name, _:
            world.delete("DiffusionWorkflow", name)
        case "break", name, _:
            world.sources[name] = ResolutionError("Offline", "no network")
        case "repair", _, _:
            world.sources.clear()
            world.resolutions.clear()
        case "pool", _, replicas:
            world.put("ModelPool", "p", {"replicas": replicas})
        case "no pool", _, _:
            world.delete("ModelPool", "p")
        case "drift", number, how:
            drift(world, number, how)
        case "some", _, limit:
            world.carry_out(world.plan(), limit)
            world.cache = PlanCache()  # the operator was killed there
        case "round", _, _:
            world.carry_out(world.plan())
            world.collect()
            world.run_pods()
        case "wait", _, seconds:
            world.wait(seconds)


def drift(world: World, number: int, how: int) -> None:
    """Somebody deletes or changes a child, or a model of the operator's."""
    keys = sorted(key for key in world.objects if key[0] in (*CHILDREN, "DiffusionModel"))
    if not keys:
        return
    kind, name = keys[number % len(keys)]
    if how == 0:
        world.delete(kind, name)
    elif how == 1:
        metadata = {**world.get(kind, name)["metadata"]}
        metadata["labels"] = {**metadata["labels"], "app.kubernetes.io/component": "other"}
        world.edit(kind, name, metadata=metadata)
    elif kind == "Deployment":
        spec = {**world.get(kind, name)["spec"], "replicas": 7}
        world.edit(kind, name, spec=spec)


def finished(world: World) -> World:
    """All has been said, all has drained."""
    for error in world.resolutions.values():
        assert error is not None
    world.settle()
    world.wait(1000)
    world.settle()
    return world


@given(STEPS)
@thorough
def test_a_namespace_settles_and_then_nothing_is_written(steps: list[Any]) -> None:
    world = World()
    for step in steps:
        take(world, step)
    finished(world)
    for _ in range(2):
        world.wait(30)
        made = world.plan()
        assert not made.writes, summary(made)
        assert not made.residency
        # Nor does a new operator write anything.
        world.cache = PlanCache()


@given(STEPS)
@thorough
def test_what_is_there_is_what_is_wanted(steps: list[Any]) -> None:
    world = World()
    for step in steps:
        take(world, step)
    finished(world)
    revisions = world.all("ControllerRevision")
    wanted: set[str] = set()
    for workflow in world.all("DiffusionWorkflow").values():
        status = workflow.get("status") or {}
        wanted |= {each["model"] for each in status.get("models") or ()}
        assert status.get("revision", "") in {"", *revisions}
    models = world.all("DiffusionModel")
    assert set(models) == wanted
    # No two models, and no two Deployments, of one identity.
    assert all(model["status"]["identity"] == name for name, model in models.items())
    pools = {f"pool-{name}" for name in world.all("ModelPool")}
    own = {
        name
        for name, model in models.items()
        if "placement" not in model["spec"] and model["spec"]["component"] != "controlnet"
    }
    assert set(world.all("Deployment")) == own | pools
    for kind in CHILDREN:
        assert set(world.all(kind)) == (own if kind == "ConfigMap" else own | pools)
    uids = {each["metadata"]["uid"] for each in world.objects.values()}
    for found in world.objects.values():
        for owner in found["metadata"].get("ownerReferences") or ():
            assert owner["uid"] in uids


@given(STEPS)
@thorough
def test_controlnets_are_where_the_transformers_of_their_workflows_are(steps: list[Any]) -> None:
    """On every node that has the transformer; and on no others."""
    world = World()
    for step in steps:
        take(world, step)
    finished(world)
    beside: dict[str, set[str]] = {}
    for workflow in world.all("DiffusionWorkflow").values():
        used = {
            each["role"]: each["model"] for each in workflow.get("status", {}).get("models", ())
        }
        if "transformer" in used:
            helpers = {m for role, m in used.items() if role.startswith("controlnet.")}
            beside.setdefault(used["transformer"], set()).update(helpers)
    for pod in world.all("Pod").values():
        report = world.residency.get(pod["metadata"]["uid"])
        there = {each.identity for each in report.models} if report is not None else set()
        wanted = set().union(*(helpers for host, helpers in beside.items() if host in there))
        assert {model for model in there if model.startswith("controlnet")} == wanted


def shuffled(observed: Observed) -> Observed:
    """The same objects, told in another order."""
    turned = {field: dict(reversed(getattr(observed, field).items())) for field in FIELDS.values()}
    return Observed(
        namespace=observed.namespace,
        now=observed.now,
        config=observed.config,
        resolutions=dict(reversed(observed.resolutions.items())),
        residency=dict(reversed(observed.residency.items())),
        **turned,
    )


def comparable(made: Plan) -> dict[str, Any]:
    return {
        **vars(made),
        "delete": sorted(made.delete, key=str),
        "residency": sorted(made.residency, key=str),
        "events": sorted(made.events, key=str),
        "resolve": sorted(each["metadata"]["name"] for each in made.resolve),
    }


@given(STEPS)
@thorough
def test_a_plan_depends_on_nothing_but_what_is_there(steps: list[Any]) -> None:
    """Neither on the order of objects nor on what was planned before; and it changes nothing."""
    world = World()
    for step in steps:
        take(world, step)
        observed = world.observed()
        before = copy.deepcopy(observed)
        made = plan(observed, world.cache)
        assert observed == before
        assert comparable(plan(observed)) == comparable(made)
        assert comparable(plan(shuffled(observed))) == comparable(made)


@given(STEPS)
@thorough
def test_a_model_in_use_is_never_deleted(steps: list[Any]) -> None:
    """Neither one of the revision that gateways serve, nor one of the newest."""
    world = World()
    for step in steps:
        take(world, step)
        made = world.plan()
        gone = {ref.name for ref in made.delete if ref.kind == "DiffusionModel"}
        for (kind, _), status in made.status.items():
            if kind == "DiffusionWorkflow":
                assert not gone & {each["model"] for each in status["models"]}
        for workflow in world.all("DiffusionWorkflow").values():
            told = made.status.get(("DiffusionWorkflow", workflow["metadata"]["name"]))
            status = told or workflow.get("status") or {}
            assert not gone & {each["model"] for each in status.get("models") or ()}
