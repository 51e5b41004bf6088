# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pods that do not serve: the reason reaches the workflow, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from kubediffusion_operator.planning.failures import of_deployment, of_pod, worst
from tests.unit.planning.world import World

TIME = "2026-01-01T00:00:01Z"


def waiting(why: str, words: str = "", /, **last: Any) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "node",
        "restartCount": 3,
        "state": {"waiting": {"reason": why, "message": words}},
    }
    if last:
        container["lastState"] = {"terminated": {"finishedAt": TIME, **last}}
    return {"phase": "Pending", "containerStatuses": [container], "conditions": []}


def crashed(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    return waiting("CrashLoopBackOff", exitCode=code, message=message, reason=reason)


def unscheduled(message: str) -> dict[str, Any]:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
        "lastTransitionTime": TIME,
    }
    return {"phase": "Pending", "conditions": [condition]}


# Status of the pod: reason, a part of the message, the fix that it ends with.
FAILURES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "the image": (
        waiting("ImagePullBackOff", "manifest unknown"),
        "ImagePullBackOff",
        "manifest unknown",
        "check the operator's image and its pull secrets",
    ),
    "the image, at the first try": (
        waiting("ErrImagePull", "no such host"),
        "ImagePullBackOff",
        "no such host",
        "its pull secrets",
    ),
    "the image's name": (
        waiting("InvalidImageName", "couldn't parse"),
        "InvalidImageName",
        "couldn't parse",
        "correct the operator's image",
    ),
    "a Secret that is not there": (
        waiting("CreateContainerConfigError", 'secret "hub" not found'),
        "CreateContainerConfigError",
        'secret "hub" not found',
        "make the Secret or ConfigMap that the pod names",
    ),
    "bad weights": (
        crashed(3, "BadWeights: model.safetensors is no whole file: torn; fetch it again"),
        "BadWeights",
        "model.safetensors is no whole file",
        "fetch it again",
    ),
    "another architecture": (
        crashed(3, "WrongArchitecture: the config says UNet"),
        "WrongArchitecture",
        "the config says UNet",
        "name a source that holds this component of the family",
    ),
    "a pickle": (
        crashed(3, "NotSafetensors: pytorch_model.bin"),
        "NotSafetensors",
        "pytorch_model.bin",
        "pickles are never loaded",
    ),
    "a gated repository": (
        crashed(3, "Unauthorized: hf://org/name is gated; accept its licence"),
        "Unauthorized",
        "is gated",
        "accept the model's licence with its account",
    ),
    "no such repository": (
        crashed(3, "SourceNotFound: there is no hf://org/name"),
        "SourceNotFound",
        "there is no hf://org/name",
        "check the source's uri, and that its volume is mounted",
    ),
    "the device's memory": (
        crashed(3, "OutOfMemory: CUDA out of memory"),
        "OutOfMemory",
        "CUDA out of memory",
        "plan fewer models on it",
    ),
    "the container's memory": (
        crashed(137, reason="OOMKilled"),
        "OOMKilled",
        "more memory than its limit",
        "raise the memory limit under resources.limits",
    ),
    "a crash": (
        crashed(1, "Traceback ...\nValueError: no"),
        "Crashed",
        "ended with exit code 1: ValueError: no",
        "kubectl logs --previous",
    ),
    "words of another program": (
        crashed(1, "Error: cannot start"),
        "Crashed",
        "exit code 1: Error: cannot start",
        "kubectl logs --previous",
    ),
    "no machine": (
        unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        "Unschedulable",
        "3 Insufficient nvidia.com/gpu",
        "goes under podTemplate",
    ),
    "an eviction": (
        {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."},
        "Evicted",
        "low on memory",
        "resources.requests",
    ),
}


@pytest.mark.parametrize(
    ("status", "reason", "part", "fix"), FAILURES.values(), ids=FAILURES.keys()
)
def test_a_pods_failure_in_a_word_and_a_sentence(
    status: dict[str, Any], reason: str, part: str, fix: str
) -> None:
    failure = of_pod({"metadata": {"name": "p"}, "status": status})
    assert failure is not None
    assert failure.reason == reason
    assert part in failure.message
    assert failure.message.endswith(fix)


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]},
        waiting("ContainerCreating"),
        {"containerStatuses": [{"name": "node", "state": {"running": {}}}]},
        {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [
                {
                    "name": "node",
                    "state": {"running": {}},
                    "lastState": {"terminated": {"exitCode": 1}},
                }
            ],
        },
        waiting("CrashLoopBackOff", exitCode=0),
    ],
    ids=["new", "scheduled", "creating", "loading", "ready after a crash", "ended well"],
)
def test_what_starts_or_serves_has_not_failed(status: dict[str, Any]) -> None:
    assert of_pod({"metadata": {"name": "p"}, "status": status}) is None


def test_between_two_tries_the_last_one_is_why() -> None:
    """Else the condition would come and go with each restart."""
    status = crashed(3, "BadWeights: torn")
    again = status["containerStatuses"][0] | {"state": {"running": {"startedAt": TIME}}}
    first = of_pod({"metadata": {"name": "p"}, "status": status})
    assert of_pod({"metadata": {"name": "p"}, "status": {"containerStatuses": [again]}}) == first


def test_a_pod_that_goes_has_not_failed() -> None:
    meta = {"name": "p", "deletionTimestamp": TIME}
    assert of_pod({"metadata": meta, "status": crashed(1)}) is None


def test_the_last_failure_of_several_pods() -> None:
    late = crashed(3, "BadWeights: torn")
    late["containerStatuses"][0]["lastState"]["terminated"]["finishedAt"] = "2026-01-02T00:00:00Z"
    pods = [
        {"metadata": {"name": "a"}, "status": crashed(1)},
        {"metadata": {"name": "b"}, "status": late},
        {"metadata": {"name": "c"}, "status": {}},
    ]
    found = worst(pods)
    assert found is not None
    assert found.reason == "BadWeights"
    assert worst(pods[2:]) is None


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (("ReplicaFailure", "True", "FailedCreate", "exceeded quota: gpus"), "QuotaExceeded"),
        (("ReplicaFailure", "True", "FailedCreate", "violates PodSecurity"), "Refused"),
        (("Progressing", "False", "ProgressDeadlineExceeded", "timed out"), "NotReady"),
        (("Progressing", "True", "NewReplicaSetAvailable", ""), None),
        (("ReplicaFailure", "False", "", ""), None),
    ],
)
def test_deployments_without_pods(condition: tuple[str, ...], reason: str | None) -> None:
    entry = dict(zip(("type", "status", "reason", "message"), condition, strict=True))
    found = of_deployment({"metadata": {"name": "d"}, "status": {"conditions": [entry]}})
    assert (found.reason if found else None) == reason


@pytest.fixture
def broken() -> World:
    """A workflow that served, and whose transformer's pods fail now."""
    world = World()
    world.workflow("w")
    world.settle()
    world.wait(9)
    world.broken[world.role("w", "transformer")] = crashed(3, "BadWeights: it is torn") | {
        "conditions": [{"type": "Ready", "status": "False"}]
    }
    world.settle()
    return world


def test_a_failure_reaches_the_workflow(broken: World) -> None:
    name = broken.role("w", "transformer")
    model = broken.status("DiffusionModel", name)
    assert model["reason"] == "BadWeights"
    assert model["lastFailure"] == {
        "reason": "BadWeights",
        "message": "it is torn; fetch or export the weights again",
        "exitCode": 3,
        "time": TIME,
    }
    ready = broken.condition("DiffusionWorkflow", "w", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "BadWeights")
    assert ready["message"] == (
        f"transformer ({name}): it is torn; fetch or export the weights again"
    )
    assert ready["lastTransitionTime"] == broken.time
    status = broken.status("DiffusionWorkflow", "w")
    assert (status["ready"], status["reason"]) == ("4/5", "BadWeights")
    told = {(e.about.kind, e.about.name, e.reason) for e in broken.events if e.type == "Warning"}
    assert told == {
        ("DiffusionModel", name, "BadWeights"),
        ("DiffusionWorkflow", "w", "BadWeights"),
    }


def test_a_failure_that_lasts_is_written_once(broken: World) -> None:
    broken.wait(600)
    assert not broken.plan().writes


def test_when_it_is_over_the_last_failure_stays(broken: World) -> None:
    name = broken.role("w", "transformer")
    broken.broken.clear()
    broken.wait(9)
    broken.settle()
    assert broken.condition("DiffusionModel", name, "Ready")["status"] == "True"
    assert broken.condition("DiffusionModel", name, "Degraded")["status"] == "False"
    assert broken.status("DiffusionModel", name)["lastFailure"]["reason"] == "BadWeights"
    assert broken.status("DiffusionWorkflow", "w")["reason"] == "Ready"


def test_what_the_api_server_refuses_is_told() -> None:
    world = World()
    world.workflow("w")
    world.settle()
    name = world.role("w", "vae")
    world.refused["Deployment", name] = 'spec.nodeName: Invalid value: "?"'
    world.settle()
    told = world.condition("DiffusionModel", name, "Degraded")
    assert told["reason"] == "Refused"
    assert told["message"].startswith("the API server refuses its Deployment: spec.nodeName")


def test_one_of_two_replicas_failing_degrades_and_serves() -> None:
    world = World()
    world.workflow("w")
    world.settle()
    name = world.role("w", "vae")
    world.set_spec("DiffusionModel", name, replicas=2)
    world.settle()
    world.edit("Pod", f"{name}-1", status=unscheduled("0/1 nodes"))
    deployment = world.get("Deployment", name)
    world.edit("Deployment", name, status={**deployment["status"], "readyReplicas": 1})
    world.carry_out(world.plan())
    assert world.condition("DiffusionModel", name, "Ready")["status"] == "True"
    assert world.condition("DiffusionModel", name, "Degraded")["reason"] == "Unschedulable"
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"
    assert world.status("DiffusionWorkflow", "w")["reason"] == "Unschedulable"
