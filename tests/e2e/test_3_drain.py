# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pods go in the middle of their work, and nobody who asked for a picture notices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from tests.cluster.kube import Object
from tests.e2e.figures import Figures
from tests.e2e.load import Load
from tests.e2e.release import Release, is_ready, tiny

# (role, killed): deleted as anybody deletes a pod, or gone at once, as with its machine.
TRIALS = (
    ("transformer", False),
    ("vae", False),
    ("text_encoder", False),
    ("transformer", True),
    ("text_encoder_2", False),
    ("transformer", False),
    ("vae", True),
    ("text_encoder_3", False),
)


@pytest.fixture(scope="module")
def models(release: Release) -> dict[str, str]:
    one = {"scaling": {"minReplicas": 1, "maxReplicas": 1}}
    release.serve(tiny("tiny-sd3", {"transformer": one}))
    return release.models("tiny-sd3")


@pytest.fixture
def load(release: Release, models: dict[str, str]) -> Iterator[Load]:
    """A client that never asks twice. Long requests: there is always one under way."""
    with Load(release.url, "tiny-sd3", rate=0.7, most=4, steps=28) as load:
        load.wait_done(4)
        yield load
    assert not load.failures
    assert all(len(digests) == 1 for digests in load.pictures().values()), load.pictures()


def replace(release: Release, model: str, killed: bool) -> None:
    """Delete the model's pod; returns when another one is Ready."""
    [pod] = release.model_pods(model)
    name = pod["metadata"]["name"]
    release.kube.delete("Pod", name, grace_seconds=0 if killed else None)

    def another(pods: list[Object]) -> bool:
        return any(each["metadata"]["name"] != name and is_ready(each) for each in pods)

    selector = f"kubediffusion.io/model={model}"
    release.kube.wait_all("Pod", another, selector=selector, timeout=120)


def lose(release: Release, models: dict[str, str], load: Load, count: int) -> float:
    """So many trials; the longest time until there was another pod."""
    longest = 0.0
    for role, killed in itertools.islice(itertools.cycle(TRIALS), count):
        begin = time.monotonic()
        replace(release, models[role], killed)
        longest = max(longest, time.monotonic() - begin)
        # Those that waited for it.
        load.wait_done(load.waiting + 1)
    return longest


def test_no_request_fails_when_pods_are_deleted(
    release: Release, figures: Figures, models: dict[str, str], load: Load
) -> None:
    longest = lose(release, models, load, len(TRIALS))
    figures.add("pods deleted while they drew", len(TRIALS), "pods")
    figures.add("until another was Ready, at the most", longest)
    figures.add("requests that failed by it", len(load.failures), "requests", at_most=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_request_fails_when_fifty_pods_are_deleted(
    release: Release, figures: Figures, models: dict[str, str], load: Load
) -> None:
    lose(release, models, load, 50)
    figures.add("pods deleted while they drew, the long study", 50, "pods")
    failures = len(load.failures)
    figures.add("requests that failed by it, the long study", failures, "requests", at_most=0)
