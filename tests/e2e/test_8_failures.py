# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a real kubelet and scheduler say of a pod reaches who applied the workflow, with the fix."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.kube import Object, condition
from tests.e2e.release import Release, tiny

# By reason: what keeps the model from starting, and what the workflow says to do.
FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "ImagePullBackOff": (
        {"podTemplate": {"spec": {"containers": [{"name": "node", "image": "localhost/no:1"}]}}},
        "check the operator's image",
    ),
    "OOMKilled": ({"resources": {"limits": {"memory": "80Mi"}}}, "raise the memory limit"),
    "Unschedulable": (
        {"podTemplate": {"spec": {"nodeSelector": {"disk": "of-gold"}}}},
        "a nodeSelector or toleration goes under podTemplate",
    ),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_a_pods_trouble_is_in_the_workflows_condition(release: Release, reason: str) -> None:
    override, fix = FAILURES[reason]
    # Of another number format, so that no other workflow has started this model already.
    release.apply(tiny("broken", {"vae": {"dtype": "bfloat16", **override}}))

    def says_why(workflow: Object) -> bool:
        ready = condition(workflow, "Ready")
        return ready.get("status") == "False" and ready.get("reason") == reason

    workflow = release.kube.wait_for("DiffusionWorkflow", "broken", says_why, timeout=120)
    message = condition(workflow, "Ready")["message"]
    assert "vae" in message
    assert fix in message
    model = release.kube.get("DiffusionModel", release.models("broken")["vae"])
    assert model["status"]["lastFailure"]["reason"] == reason
    assert reason in release.kubectl("get", "dwf", "broken")
    # Mended, it needs nobody's help.
    release.serve(tiny("broken", {"vae": {"dtype": "bfloat16"}}))
    release.delete_workflows(["broken"])
    release.kube.wait_gone("DiffusionModel", model["metadata"]["name"], timeout=60)
