# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Running nodes are told what to host, and what they answer reaches the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.kube import ApiError, Kube, condition, is_true
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.fake_node import FakeNode
from tests.cluster.operator.running import OperatorProcess
from tests.cluster.operator.wanted import (
    API_VERSION,
    CHILDREN,
    models_of,
    pipeline,
    present,
    workflow,
)

LONG = 90.0


def pool(name: str, replicas: int = 1) -> dict:
    spec = {"replicas": replicas, "memoryLimit": "8Gi"}
    about = {"apiVersion": API_VERSION, "kind": "ModelPool", "metadata": {"name": name}}
    return {**about, "spec": spec}


def test_a_lora_reaches_running_nodes_without_new_pods(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    uri = pipeline(tmp_path / "p")
    definition = workflow("sd3", uri)
    kube.apply(definition)
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    transformer = models_of(definition)["transformer"]
    node.wait_for(transformer)
    before = kube.get("Deployment", transformer)
    style = tmp_path / "style"
    style.mkdir()
    loras = [{"name": "style", "source": {"uri": f"file://{style}"}}]
    kube.apply(workflow("sd3", uri, loras=loras))
    told = node.wait_for(transformer, lambda model: model.get("loras"), timeout=LONG)
    assert told["loras"][0]["name"] == "style"
    after = kube.get("Deployment", transformer)
    assert after["spec"]["template"] == before["spec"]["template"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"]
    kube.wait_for(
        "ConfigMap", transformer, lambda c: "style" in c["data"]["residency.json"], timeout=LONG
    )


def edges(folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    return {"name": "edges", "source": {"uri": f"file://{folder}"}}


def test_a_controlnet_reaches_its_transformers_running_nodes(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    uri = pipeline(tmp_path / "p")
    kube.apply(workflow("sd3", uri))
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    definition = workflow("sd3", uri, controlNets=[edges(tmp_path / "edges")])
    models = models_of(definition)
    host, helper = models["transformer"], models["controlnet.edges"]
    before = kube.get("Deployment", host)
    kube.apply(definition)
    node.wait_for(helper, timeout=LONG)
    told = next(r for r in reversed(node.requests) if len(r["models"]) > 1)
    assert [each["identity"] for each in told["models"]] == [host, helper]
    kube.wait_for("dwf", "sd3", lambda w: w["status"].get("ready") == "6/6", timeout=LONG)
    found = kube.wait_for("dmodel", helper, is_true("Ready"), timeout=LONG)
    status = found["status"]
    assert status["hostedBy"] == [host]
    assert (status["readyReplicas"], status["replicas"], status["desiredReplicas"]) == (1, 1, 1)
    assert status["digest"] == f"sha256:{helper}"
    assert "replicas" not in found["spec"]
    for kind in CHILDREN:
        assert helper not in present(kube, kind)
    after = kube.get("Deployment", host)
    assert after["spec"]["template"] == before["spec"]["template"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"]

    # An HPA finds no number to change.
    with pytest.raises(ApiError, match="does not exist"):
        kube.get("dmodel", helper, subresource="scale")
    # kubectl scale: the API server takes it, and the model says what to scale instead.
    kube.patch("dmodel", helper, {"spec": {"replicas": 3}}, subresource="scale", how="merge")
    found = kube.wait_for(
        "dmodel",
        helper,
        lambda m: condition(m, "CoHosted")["reason"] == "FieldsIgnored",
        timeout=LONG,
    )
    assert "scale and place what it runs beside" in condition(found, "CoHosted")["message"]
    kube.patch("dmodel", host, {"spec": {"replicas": 2}}, subresource="scale", how="merge")
    kube.wait_for("dmodel", helper, lambda m: m["status"]["readyReplicas"] == 2, timeout=LONG)


def test_a_controlnets_memory_comes_with_new_pods(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    def memory(size: str) -> dict:
        return {"resources": {"limits": {"memory": size}}}

    uri, models = pipeline(tmp_path / "p"), {"transformer": memory("2Gi")}
    kube.apply(workflow("sd3", uri, models=models))
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    models["controlnet.edges"] = memory("1Gi")
    definition = workflow("sd3", uri, models=models, controlNets=[edges(tmp_path / "edges")])
    host = models_of(definition)["transformer"]
    (old,) = kube.list("Pod", selector=f"kubediffusion.io/model={host}")
    kube.apply(definition)
    kube.wait_for("dwf", "sd3", lambda w: w["status"].get("ready") == "6/6", timeout=LONG)
    there = kube.list("Pod", selector=f"kubediffusion.io/model={host}")
    new = [pod for pod in there if pod["metadata"]["uid"] != old["metadata"]["uid"]]
    assert [pod["spec"]["containers"][0]["resources"]["limits"]["memory"] for pod in new] == ["3Gi"]
    deployment = kube.get("Deployment", host)
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["kubediffusion.io/helpers"] == "memory=1024Mi/1024Mi"


def test_models_in_a_pool_are_hosted_by_its_nodes(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    kube.apply(pool("shared"))
    models = {"text_encoder": {"placement": {"pool": "shared"}}}
    models["text_encoder_2"] = {"placement": {"pool": "shared"}}
    definition = workflow("sd3", pipeline(tmp_path / "p"), models=models)
    kube.apply(definition)
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    identities = models_of(definition)
    placed = {identities["text_encoder"], identities["text_encoder_2"]}
    deployments = present(kube, "Deployment")
    assert deployments == {"pool-shared"} | (set(identities.values()) - placed)
    found = kube.wait_for("mpool", "shared", is_true("PlanApplied"), timeout=LONG)
    assert {each["model"] for each in found["status"]["plan"]} == placed
    for identity in placed:
        node.wait_for(identity)
        model = kube.wait_for("dmodel", identity, lambda m: m["status"].get("digest"), timeout=LONG)
        assert model["status"]["digest"] == f"sha256:{identity}"

    kube.delete("dwf", "sd3")
    kube.wait_for("mpool", "shared", lambda p: not p["status"].get("plan"), timeout=LONG)
    kube.delete("mpool", "shared")
    kube.wait_gone("Deployment", "pool-shared", timeout=LONG)


def test_what_a_node_says_of_bad_weights_reaches_the_workflow_and_passes(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    kube.apply(pool("shared"))
    models = {"vae": {"placement": {"pool": "shared"}}}
    definition = workflow("sd3", pipeline(tmp_path / "p"), models=models)
    identity = models_of(definition)["vae"]
    node.failing[identity] = ("BadWeights", "the file is torn; fetch it again")
    kube.apply(definition)
    found = kube.wait_for(
        "dwf", "sd3", lambda w: condition(w, "Degraded").get("status") == "True", timeout=LONG
    )
    assert condition(found, "Degraded")["reason"] == "BadWeights"
    assert "the file is torn" in condition(found, "Degraded")["message"]
    assert condition(found, "Ready")["status"] != "True"


def served(found: dict) -> str:
    return found["status"].get("revision", "")


def test_a_revision_with_another_lora_is_served_when_the_nodes_know_of_it(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    uri = pipeline(tmp_path / "p")
    definition = workflow("sd3", uri)
    kube.apply(definition)
    first = served(kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG))
    transformer = models_of(definition)["transformer"]
    node.wait_for(transformer)
    node.answers.clear()
    style = tmp_path / "style"
    style.mkdir()
    loras = [{"name": "style", "source": {"uri": f"file://{style}"}}]
    kube.apply(workflow("sd3", uri, loras=loras))
    # Told, and nobody answered.
    node.wait_for(transformer, lambda model: model.get("loras"), timeout=LONG)
    found = kube.wait_for("dwf", "sd3", _waits, timeout=LONG)
    assert served(found) == first
    node.answers.set()
    found = kube.wait_for("dwf", "sd3", lambda w: served(w) != first, timeout=LONG)
    assert [each["revision"] for each in found["status"].get("draining", [])] == []
    # A request may name it until its drain time is over.
    kube.apply(workflow("sd3", uri))
    found = kube.wait_for("dwf", "sd3", lambda w: w["status"].get("draining"), timeout=LONG)
    assert found["status"]["previousRevision"] == found["status"]["draining"][0]["revision"]
    assert node.wait_for(transformer)["loras"]


def _waits(found: dict) -> bool:
    return "to know its LoRAs" in condition(found, "Progressing").get("message", "")


def _looks(node: FakeNode, identity: str) -> int:
    """How often nodes of the model were told their plan."""
    return sum(any(m["identity"] == identity for m in r["models"]) for r in node.requests)


def test_old_models_go_when_their_nodes_say_that_they_are_idle(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    uri = pipeline(tmp_path / "p")

    def version(dtype: str) -> dict:
        return workflow("sd3", uri, models={"transformer": {"dtype": dtype, "drainSeconds": 1}})

    names = {
        dtype: models_of(version(dtype))["transformer"]
        for dtype in ("float32", "bfloat16", "float16")
    }
    old, middle, new = names.values()
    kube.apply(version("float32"))
    first = kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
    node.tasks |= {old: 2, middle: 1}
    revisions = [served(first)]
    for dtype in ("bfloat16", "float16"):
        kube.apply(version(dtype))
        found = kube.wait_for("dwf", "sd3", lambda w: served(w) not in revisions, timeout=LONG)
        kube.wait_for("dmodel", names[dtype], is_true("Ready"), timeout=LONG)
        revisions.append(served(found))
    found = kube.wait_for(
        "dwf", "sd3", lambda w: len(w["status"].get("draining", [])) == 2, timeout=LONG
    )
    looks = _looks(node, old)
    # Asked again and again; each time it has tasks.
    node.wait_for(old, lambda _: _looks(node, old) >= looks + 3)
    assert {old, middle, new} <= present(kube, "Deployment")
    node.tasks[middle] = 0
    kube.wait_gone("dmodel", middle, timeout=LONG)
    assert {old, new} <= present(kube, "Deployment")
    # A request that has not come to it yet.
    node.needed[old] = 1
    node.tasks[old] = 0
    looks = _looks(node, old)
    node.wait_for(old, lambda _: _looks(node, old) >= looks + 2)
    assert {old, new} <= present(kube, "Deployment")
    node.needed[old] = 0
    kube.wait_gone("dmodel", old, timeout=LONG)
    kube.wait_for("dwf", "sd3", lambda w: not w["status"].get("draining"), timeout=LONG)


def test_nodes_of_a_newer_version_are_asked_until_they_say_what_is_known(
    operator: OperatorProcess, kube: Kube, kubelet: FakeKubelet, node: FakeNode, tmp_path: Path
) -> None:
    kube.apply(pool("shared"))
    models = {"vae": {"placement": {"pool": "shared"}}}
    definition = workflow("sd3", pipeline(tmp_path / "p"), models=models)
    identity = models_of(definition)["vae"]
    node.states[identity] = 99
    kube.apply(definition)
    node.wait_for(identity)
    kube.wait_for("mpool", "shared", lambda p: p["status"].get("plan"), timeout=LONG)
    assert not is_true("PlanApplied")(kube.get("mpool", "shared"))
    del node.states[identity]
    kube.wait_for("mpool", "shared", is_true("PlanApplied"), timeout=LONG)
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=LONG)
