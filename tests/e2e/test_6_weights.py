# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights come from the Hub once, whoever needs them afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.kube import ROOT
from tests.e2e.cluster import BRIDGE, HUB_PORT
from tests.e2e.release import Release, tiny
from tests.unit.sources.hub_server import Hub, served

PIPELINE = ROOT / "models/tiny-sd3/pipeline"
SOURCE = {"uri": "hf://org/name"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """tiny-sd3 as a repository of a hub that pods reach."""
    files = {
        str(path.relative_to(PIPELINE)): path.read_bytes()
        for path in PIPELINE.rglob("*")
        if path.is_file()
    }
    with served(Hub(files), BRIDGE, HUB_PORT) as hub:
        yield hub


def downloads(hub: Hub) -> list[str]:
    return hub.paths("GET", ".safetensors")


def test_a_scale_up_downloads_nothing_again(release: Release, hub: Hub) -> None:
    pipeline = {"preset": "StableDiffusion3", "source": SOURCE}

    def with_replicas(count: int) -> dict:
        scaling = {"minReplicas": count, "maxReplicas": count}
        return tiny("from-hub", {"transformer": {"scaling": scaling}}, pipeline=pipeline)

    release.serve(with_replicas(1))
    weights = downloads(hub)
    assert len(weights) == len(set(weights)), "a file was asked for twice"
    assert any("/transformer/" in path for path in weights)
    drawn = release.draw("from-hub")

    dit = release.models("from-hub")["transformer"]
    release.serve(with_replicas(2))
    release.kube.wait_for(
        "DiffusionModel",
        dit,
        lambda model: model.get("status", {}).get("readyReplicas") == 2,
        timeout=120,
    )
    assert downloads(hub) == weights
    # Nor does a pod need the Hub to start again.
    hub.status = 503
    [pod, _] = release.model_pods(dit)
    release.kube.delete("Pod", pod["metadata"]["name"])
    release.kube.wait_gone("Pod", pod["metadata"]["name"], timeout=60)
    release.kube.wait_for(
        "DiffusionModel",
        dit,
        lambda model: model.get("status", {}).get("readyReplicas") == 2,
        timeout=120,
    )
    assert release.draw("from-hub") == drawn
    release.delete_workflows(["from-hub"])
