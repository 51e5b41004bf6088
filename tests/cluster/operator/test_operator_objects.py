# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a workflow brings and takes with it, on a real API server with real garbage collection."""

from __future__ import annotations

import time
from pathlib import Path

from tests.cluster.kube import ControlPlane, Kube, condition, is_true
from tests.cluster.operator.conftest import NewOperator
from tests.cluster.operator.fake_kubelet import FakeKubelet, stamp, waiting
from tests.cluster.operator.running import ACCOUNT, OperatorProcess
from tests.cluster.operator.wanted import (
    API_VERSION,
    CHILDREN,
    NODES,
    models_of,
    models_of_all,
    pipeline,
    users_of,
    versions,
    wait_for_models,
    workflow,
)

LONG = 60.0


def test_a_workflow_brings_its_models_and_becomes_ready(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet
) -> None:
    definition = workflow("sd3")
    made = kube.apply(definition)
    wait_for_models(kube, set(models_of(definition).values()))
    ready = kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    assert ready["status"]["ready"] == "5/5"
    assert ready["status"]["revision"].startswith("sd3-")
    (revision,) = kube.list("ControllerRevision", selector="kubediffusion.io/workflow=sd3")
    assert revision["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    for name in models_of(definition).values():
        model = kube.wait_for("dmodel", name, is_true("Ready"))
        assert users_of(model) == {"sd3"}
        assert "finalizers" not in model["metadata"]
        for kind in CHILDREN:
            (owner,) = kube.get(kind, name)["metadata"]["ownerReferences"]
            assert (owner["uid"], owner["controller"]) == (model["metadata"]["uid"], True)
    assert "finalizers" not in ready["metadata"]
    assert not any("kopf" in key for key in ready["metadata"].get("annotations", {}))
    # The heartbeat counts now and then.
    end = time.monotonic() + LONG
    while operator.metric("models", state="ready") != 5 and time.monotonic() < end:
        time.sleep(0.1)
    assert operator.metric("workflows", state="ready") == 1
    assert operator.metric("models", state="ready") == 5


def test_models_are_shared_and_go_with_their_last_user(
    operator: OperatorProcess, kube: Kube, tmp_path: Path
) -> None:
    first = workflow("first", pipeline(tmp_path / "a"))
    other = pipeline(tmp_path / "b")
    models = {"transformer": {"source": {"uri": other, "subfolder": "transformer"}}}
    second = workflow("second", pipeline(tmp_path / "a"), models=models)
    kube.apply(first)
    kube.apply(second)
    both = models_of_all([first, second])
    assert len(both) == 6
    wait_for_models(kube, both)
    shared = models_of(first)["vae"]
    kube.wait_for("dmodel", shared, lambda m: users_of(m) == {"first", "second"}, timeout=LONG)

    kube.delete("dwf", "first")
    wait_for_models(kube, models_of_all([second]))
    kube.wait_for("dmodel", shared, lambda m: users_of(m) == {"second"}, timeout=LONG)

    kube.delete("dwf", "second")
    wait_for_models(kube, set())
    kube.wait_all("ControllerRevision", lambda found: not found, timeout=LONG)
    kube.wait_all("ReplicaSet", lambda found: not found, selector=NODES, timeout=LONG)


def test_a_model_made_by_hand_is_served_and_never_deleted(
    operator: OperatorProcess, kube: Kube
) -> None:
    definition = workflow("sd3")
    mine = models_of(definition)["vae"]
    spec = {
        "family": "sd3",
        "component": "vae",
        "className": "AutoencoderKL",
        "source": {"uri": "builtin://tiny-sd3", "subfolder": "vae"},
    }
    about = {"name": mine}
    kube.apply(
        {"apiVersion": API_VERSION, "kind": "DiffusionModel", "metadata": about, "spec": spec}
    )
    wait_for_models(kube, {mine})
    kube.apply(definition)
    wait_for_models(kube, set(models_of(definition).values()))
    kube.delete("dwf", "sd3")
    wait_for_models(kube, {mine})
    assert users_of(kube.get("dmodel", mine)) == set()


def test_drift_is_put_back(operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet) -> None:
    definition = workflow("sd3")
    kube.apply(definition)
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    name = models_of(definition)["vae"]
    service = kube.get("Service", name)
    kube.delete("Service", name)
    kube.wait_for(
        "Service", name, lambda s: s["metadata"]["uid"] != service["metadata"]["uid"], timeout=LONG
    )
    patch = {"spec": {"replicas": 7, "template": {"spec": {"terminationGracePeriodSeconds": 3}}}}
    kube.patch("Deployment", name, patch)
    kube.wait_for(
        "Deployment",
        name,
        lambda d: (
            d["spec"]["replicas"] == 1
            and d["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 3
        ),
        timeout=LONG,
    )
    kube.patch("ConfigMap", name, {"data": {"residency.json": "{}"}})
    kube.wait_for(
        "ConfigMap", name, lambda c: "planner" in c["data"]["residency.json"], timeout=LONG
    )
    kube.delete("dmodel", name)
    wait_for_models(kube, set(models_of(definition).values()))
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)


def rest(
    plane: ControlPlane, operator: OperatorProcess, kube: Kube, seconds: float
) -> tuple[list, dict]:
    """The operator's writes within `seconds`, and the objects whose version is another since."""
    mark, before = plane.now(), versions(kube)
    time.sleep(seconds)  # the one thing that can only be waited for: nothing
    operator.check()
    after = versions(kube)
    changed = {key: after.get(key) for key in after | before if after.get(key) != before.get(key)}
    user = f"system:serviceaccount:{kube.namespace}:{ACCOUNT}"
    return plane.writes(mark, user=user), changed


def wait_quiet(plane: ControlPlane, kube: Kube, seconds: float = 2.0) -> None:
    """Until the operator has written nothing for so long."""
    user = f"system:serviceaccount:{kube.namespace}:{ACCOUNT}"
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        mark = plane.now()
        time.sleep(seconds)
        if not plane.writes(mark, user=user):
            return
    raise TimeoutError("the operator does not come to rest")


def test_at_rest_nothing_is_written(
    control_plane: ControlPlane, operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet
) -> None:
    begin = control_plane.now()
    kube.apply(workflow("sd3"))
    kube.apply(workflow("broken", "file:///nowhere"))
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    kube.wait_for("dwf", "broken", lambda w: condition(w, "Resolved").get("status") == "False")
    wait_quiet(control_plane, kube)
    user = f"system:serviceaccount:{kube.namespace}:{ACCOUNT}"
    assert len(control_plane.writes(begin, user=user)) > 30  # what is counted is counted
    writes, changed = rest(control_plane, operator, kube, 10.0)
    assert (writes, changed) == ([], {})


def test_two_operators_at_once_do_no_harm(
    control_plane: ControlPlane,
    new_operator: NewOperator,
    kube: Kube,
    kubelet: FakeKubelet,
    tmp_path: Path,
) -> None:
    """As while one is moved from a machine that does not answer."""
    operators = [new_operator(), new_operator()]
    for each in operators:
        each.start()
    there = [workflow(f"w{number}", pipeline(tmp_path / f"p{number % 2}")) for number in range(4)]
    for each in there:
        kube.apply(each)
    for each in there:
        kube.wait_for("dwf", each["metadata"]["name"], is_true("Ready"), timeout=LONG)
    kube.delete("dwf", "w0")
    kube.delete("dwf", "w2")
    wait_for_models(kube, models_of_all([there[1], there[3]]))
    wait_quiet(control_plane, kube)
    writes, changed = rest(control_plane, operators[0], kube, 5.0)
    assert (writes, changed) == ([], {})
    operators[1].check()


def test_a_pods_trouble_reaches_the_workflow(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet
) -> None:
    message = 'Back-off pulling image "example/node:1"'
    kubelet.verdict = waiting("ImagePullBackOff", message)
    kube.apply(workflow("sd3"))
    found = kube.wait_for(
        "dwf", "sd3", lambda w: condition(w, "Degraded").get("status") == "True", timeout=LONG
    )
    assert "Image" in condition(found, "Degraded")["reason"]
    assert "example/node:1" in condition(found, "Degraded")["message"]

    def told(events: list) -> bool:
        return any("Image" in event["reason"] for event in events)

    kube.wait_all("events.k8s.io/v1/Event", told, timeout=LONG)


def test_a_crashing_pod_tells_its_exit_code_and_last_words(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet
) -> None:
    ended = {
        "exitCode": 3,
        "reason": "Error",
        "message": "BadWeights: vae: the file is torn; fetch it again",
        "startedAt": stamp(),
        "finishedAt": stamp(),
    }
    kubelet.verdict = waiting(
        "CrashLoopBackOff", "back-off 10s", last={"terminated": ended}, restarts=3
    )
    definition = workflow("sd3")
    kube.apply(definition)
    found = kube.wait_for(
        "dwf", "sd3", lambda w: condition(w, "Degraded").get("status") == "True", timeout=LONG
    )
    assert "BadWeights" in str(condition(found, "Degraded"))
    model = kube.wait_for(
        "dmodel",
        models_of(definition)["vae"],
        lambda m: m.get("status", {}).get("lastFailure"),
        timeout=LONG,
    )
    assert model["status"]["lastFailure"]["exitCode"] == 3
    assert "the file is torn" in model["status"]["lastFailure"]["message"]


def test_a_broken_workflow_says_why_and_mending_it_helps(
    operator: OperatorProcess, kube: Kube, tmp_path: Path
) -> None:
    kube.apply(workflow("sd3", f"file://{tmp_path}/missing"))
    kube.apply(workflow("fine", pipeline(tmp_path / "fine")))
    found = kube.wait_for(
        "dwf", "sd3", lambda w: condition(w, "Resolved").get("status") == "False", timeout=LONG
    )
    assert condition(found, "Resolved")["reason"] == "SourceNotFound"
    assert "missing" in condition(found, "Resolved")["message"]
    wait_for_models(kube, models_of_all([workflow("fine", f"file://{tmp_path}/fine")]))
    mended = workflow("sd3", pipeline(tmp_path / "there"))
    kube.apply(mended)
    kube.wait_for("dwf", "sd3", is_true("Resolved"), timeout=LONG)
    wait_for_models(kube, models_of_all([mended, workflow("fine", f"file://{tmp_path}/fine")]))
