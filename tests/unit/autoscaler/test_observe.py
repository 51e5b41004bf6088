# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A namespace as the decisions see it: replicas, GPUs, workflows, and who is not ours."""

from __future__ import annotations

import pytest
from autoscaler_cases import CONFIG, SPACE, deployment, model, named, pod, reading

from kubediffusion.scaling import Budget, MetricState, WorkflowCase
from kubediffusion_operator.autoscaler.observe import NamespaceObjects, View, observe
from kubediffusion_operator.autoscaler.prometheus import PrometheusUnavailable
from kubediffusion_operator.config import OperatorConfig, ScalingConfig


def view(*models, numbers=None, config=CONFIG, **objects) -> View:
    found = NamespaceObjects(SPACE, named(*models), **objects)
    return observe(found, numbers or reading(queued=1), config)


def of(*pods, replicas=3, **objects):
    seen = view(model(replicas=replicas), pods=named(*pods), **objects).scaled["dit"]
    return seen.observation


# ---------------------------------------------------------------- whose replicas


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"mode": "external", "minReplicas": 1, "maxReplicas": 4}, "External"),
        ({}, ""),
        ({"minReplicas": 1, "maxReplicas": 4, "horoscope": "x"}, "NotUnderstood"),
        ({"minReplicas": 1, "maxReplicas": 4, "targetPerReplica": "many"}, "NotUnderstood"),
    ],
)
def test_models_that_others_scale_are_left_to_them(scaling, reason):
    seen = view(model(scaling=scaling))
    assert not seen.scaled
    assert seen.left["dit"].reason == reason


def test_a_field_that_is_not_understood_is_named():
    why = view(model(scaling={"maxReplicas": 4, "horoscope": "x"})).left["dit"].why
    assert "scaling.horoscope" in why
    assert "upgrade the operator" in why


def test_nothing_is_scaled_where_scaling_is_off():
    config = OperatorConfig(image="n", scaling=ScalingConfig(enabled=False))
    assert view(model(), config=config).left["dit"].reason == "Disabled"


def test_a_controlnet_scales_with_its_transformer_and_takes_no_gpu_of_its_own():
    config = OperatorConfig(image="n", device="cuda")
    edges = model("edges", replicas=2, component="controlnet", users=("sd3",))
    hand_made = model("depth", replicas=None, component="controlnet", scaling={})
    seen = view(edges, hand_made, model(), config=config)
    assert set(seen.scaled) == {"dit"}
    assert (seen.left["edges"].reason, seen.left["depth"].reason) == ("CoHosted", "")
    assert "status.hostedBy" in seen.left["edges"].why
    assert seen.budget.reserved == 0
    # From zero its transformer alone comes up, in whose pods it is.
    assert seen.workflows["sd3"].models == {"edges", "depth", "dit"}


def test_pods_that_a_controlnet_has_from_before_hold_their_gpus():
    edges = model("edges", component="controlnet")
    seen = view(edges, pods=named(pod("e1", of="edges", gpus=1)))
    assert seen.budget.reserved == 1


def test_a_model_that_goes_is_neither():
    going = model()
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    seen = view(going)
    assert not seen.scaled
    assert not seen.left


@pytest.mark.parametrize(("replicas", "current"), [(None, 2), (0, 0), (5, 5)])
def test_a_model_that_was_never_scaled_has_its_minimum(replicas, current):
    seen = view(model(replicas=replicas, scaling={"minReplicas": 2, "maxReplicas": 4}))
    assert seen.scaled["dit"].observation.current == current


# ---------------------------------------------------------------- replicas


def test_pods_by_what_they_are():
    observed = of(pod("a", ready=True), pod("b"), pod("c", waiting="ImagePullBackOff"))
    assert (observed.ready, observed.starting, observed.stuck) == (1, 1, 1)
    assert observed.stuck_reason == "ImagePullBackOff"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"waiting": "ErrImagePull"}, "ImagePullBackOff"),
        ({"waiting": "CrashLoopBackOff", "crashed": True}, "Crashed"),
        ({"crashed": True}, "Crashed"),  # between two crashes it runs
        ({"unschedulable": True, "phase": "Pending"}, "Unschedulable"),
        ({"waiting": "CreateContainerConfigError"}, "CreateContainerConfigError"),
    ],
)
def test_pods_that_cannot_start(what, reason):
    observed = of(pod("a", **what), replicas=1)
    assert (observed.stuck, observed.capacity, observed.stuck_reason) == (1, 0, reason)


def test_a_pod_that_serves_again_after_a_crash_is_ready():
    observed = of(pod("a", crashed=True, ready=True), replicas=1)
    assert (observed.ready, observed.stuck) == (1, 0)


def test_pods_that_go_or_are_over_are_none():
    going = [pod("a", ready=True, going=True), pod("b", phase="Failed"), pod("c", ready=True)]
    seen = view(model(replicas=2), pods=named(*going)).scaled["dit"]
    assert (seen.live, seen.ending) == (1, 1)
    assert (seen.observation.ready, seen.observation.starting) == (1, 1)


def test_pods_that_a_quota_forbids_cannot_start():
    refused = {
        "type": "ReplicaFailure",
        "status": "True",
        "message": 'pods "dit-x" is forbidden: exceeded quota: gpus',
    }
    observed = of(
        pod("a", ready=True), deployments=named(deployment(conditions=(refused,))), replicas=4
    )
    assert (observed.ready, observed.stuck) == (1, 3)
    assert observed.stuck_reason == "QuotaExceeded"


def test_pods_that_start_for_too_long_cannot_start():
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    observed = of(
        pod("a", ready=True),
        pod("b"),
        deployments=named(deployment(conditions=(late,))),
        replicas=2,
    )
    assert (observed.ready, observed.stuck, observed.stuck_reason) == (1, 1, "NotReady")


def test_never_more_stuck_than_there_should_be():
    pods = [pod(name, waiting="ErrImagePull") for name in "abc"]
    assert of(*pods, replicas=1).stuck == 1


def test_a_model_in_a_pool_has_the_nodes_that_serve_it():
    placed = model(replicas=3, placement={"pool": "p"})
    placed["status"]["readyReplicas"] = 2
    seen = view(placed, pods=named(pod("n", of="p", label="pool", ready=True))).scaled["dit"]
    assert (seen.observation.ready, seen.observation.starting) == (2, 1)
    assert seen.gpus == 0


# ---------------------------------------------------------------- numbers


def test_without_an_answer_the_demand_is_unknown_for_its_reason():
    problem = PrometheusUnavailable("http://p does not answer", reason="PrometheusTimeout")
    metrics = view(model(), numbers=problem).scaled["dit"].observation.metrics
    assert (metrics.state, metrics.reason) == (MetricState.UNKNOWN, "PrometheusTimeout")
    assert metrics.why == "http://p does not answer"


def test_workflows_by_who_refers_to_the_models():
    seen = view(
        model("dit", users=("sd3", "turbo")),
        model("vae", users=("sd3",)),
        model("mine", users=(), scaling={"mode": "external"}),
        numbers=reading(workflow_held=2),
    )
    assert seen.workflows == {
        "sd3": WorkflowCase(frozenset({"dit", "vae"}), 2.0),
        "turbo": WorkflowCase(frozenset({"dit"}), None),
    }


def test_owners_are_users_before_the_status_says_so():
    new = model(users=())
    owner = {"kind": "DiffusionWorkflow", "name": "sd3", "uid": "u"}
    new["metadata"]["ownerReferences"] = [owner, {"kind": "Sponsor", "name": "x", "uid": "v"}]
    assert set(view(new).workflows) == {"sd3"}


# ---------------------------------------------------------------- GPUs


def test_gpus_are_those_of_the_pods():
    deployments = named(deployment(gpus=2))
    assert view(model(), deployments=deployments).scaled["dit"].gpus == 2
    assert view(model(), deployments=named(deployment())).scaled["dit"].gpus == 0


@pytest.mark.parametrize(
    ("device", "resources", "gpus"),
    [
        ("cuda", None, 1),
        ("cpu", None, 0),
        ("cuda", {"limits": {"nvidia.com/gpu": "4"}}, 4),
        ("cuda", {"requests": {"nvidia.com/gpu": "2"}, "limits": {"nvidia.com/gpu": "2"}}, 2),
        ("cuda", {"limits": {"amd.com/gpu": "1"}}, 0),
        ("cuda", {"claims": [{"name": "gpu"}]}, 0),
    ],
)
def test_before_there_is_a_deployment_they_are_what_it_will_ask_for(device, resources, gpus):
    config = OperatorConfig(image="n", device=device)
    more = {} if resources is None else {"resources": resources}
    assert view(model(**more), config=config).scaled["dit"].gpus == gpus


def quota(hard, used="0", **spec):
    name = "requests.nvidia.com/gpu"
    return {"spec": {"hard": {name: hard}, **spec}, "status": {"used": {name: used}}}


def test_the_tightest_quota_is_the_budget():
    quotas = [quota("8", "1"), quota("6", "5"), quota("1", scopes=["BestEffort"])]
    config = OperatorConfig(image="n", scaling=ScalingConfig(gpuBudget=4))
    assert view(model(), config=config, quotas=quotas).budget == Budget(4, 6, 5, 0)


def test_a_quota_on_something_else_is_no_budget():
    quotas = [{"spec": {"hard": {"requests.cpu": "8"}}}]
    assert view(model(), quotas=quotas).budget == Budget()


def test_gpus_of_what_is_not_ours_are_taken():
    """Two external replicas of two GPUs and one that drains; a pool of three; an orphan."""
    seen = view(
        model("theirs", replicas=2, scaling={"mode": "external"}),
        model("ours"),
        deployments=named(deployment("theirs", gpus=2), deployment("pool-p", gpus=1)),
        pods=named(
            pod("t1", of="theirs", gpus=2),
            pod("t2", of="theirs", gpus=2, going=True),
            pod("p1", of="p", label="pool", gpus=1),
            pod("x", of="deleted", gpus=1, going=True),
            pod("y", of="deleted", gpus=1, phase="Succeeded"),
        ),
        pools={"p": {"metadata": {"name": "p"}, "spec": {"replicas": 3}}},
    )
    assert seen.budget.reserved == (2 + 1) * 2 + 3 + 1
