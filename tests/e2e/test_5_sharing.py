# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Two workflows on the same models: one set of pods, which goes with the last of them."""

from __future__ import annotations

import time

from tests.cluster.kube import ROOT
from tests.e2e.figures import Figures
from tests.e2e.release import Release

SECOND = ROOT / "examples/tiny-sd3-draft.yaml"
NODES = "app.kubernetes.io/component=model-node"
# What the operator makes for a model.
CHILDREN = ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy")


def nodes(release: Release) -> set[str]:
    """The model nodes' pods that are not going."""
    pods = release.kube.list("Pod", selector=NODES)
    return {pod["metadata"]["name"] for pod in pods if not pod["metadata"].get("deletionTimestamp")}


def test_a_second_workflow_starts_no_pod_and_the_last_one_takes_all_along(
    release: Release, figures: Figures
) -> None:
    release.delete_workflows()
    release.serve_example()
    first, pods = release.models("tiny-sd3"), nodes(release)

    begin = time.monotonic()
    release.kubectl("apply", "-f", str(SECOND))
    release.ready("tiny-sd3-draft")
    figures.add("kubectl apply of a workflow whose models are served", time.monotonic() - begin)
    second = release.models("tiny-sd3-draft")
    assert second.items() < first.items()
    assert nodes(release) == pods
    drawn = release.draw("tiny-sd3-draft")

    release.delete_workflows(["tiny-sd3"])
    alone = set(first.values()) - set(second.values())
    for model in alone:
        release.kube.wait_gone("DiffusionModel", model)
        release.kube.wait_all(
            "Pod", lambda left: not left, selector=f"kubediffusion.io/model={model}", timeout=60
        )
    # T5 went with its pod; the ControlNet had none of its own.
    left = nodes(release)
    assert left < pods
    assert len(left) == len(second)
    assert release.draw("tiny-sd3-draft") == drawn
    # Both come back, the ControlNet to the transformer's nodes as they are.
    release.serve_example()
    assert release.models("tiny-sd3") == first
    assert nodes(release) > left
    assert len(nodes(release)) == len(pods)

    release.delete_workflows()
    for kind in CHILDREN:
        release.kube.wait_all(kind, lambda left: not left, selector=NODES, timeout=60)
    assert not release.kube.list("ControllerRevision")
