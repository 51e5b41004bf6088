# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow changes while it is used: the old revision serves until the new one can."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.figures import Figures
from tests.e2e.load import SEEDS, Load, digest_of
from tests.e2e.release import Release, tiny

# So that what is replaced is gone soon.
BEFORE = {"transformer": {"drainSeconds": 15}}
# Another number format is another model, and another picture.
AFTER = {"transformer": {"drainSeconds": 15, "dtype": "bfloat16"}}


@pytest.fixture
def load(release: Release) -> Iterator[Load]:
    release.serve(tiny("tiny-sd3", BEFORE))
    with Load(release.url, "tiny-sd3", rate=0.7, most=4, steps=20) as load:
        load.wait_done(SEEDS + 1)
        yield load
    assert not load.failures


def pictures(release: Release) -> dict[int, set[str]]:
    """Of what is served now."""
    return {seed: {digest_of(release.draw("tiny-sd3", seed, steps=20))} for seed in range(SEEDS)}


def test_the_old_revision_serves_until_the_new_one_is_ready_and_rollback_brings_it_back(
    release: Release, figures: Figures, load: Load
) -> None:
    before = pictures(release)
    old = release.models("tiny-sd3")["transformer"]
    begin = time.monotonic()
    release.serve(tiny("tiny-sd3", AFTER))
    figures.add("edit of a transformer, until the new one serves", time.monotonic() - begin)
    after = pictures(release)
    assert all(before[seed] != after[seed] for seed in before)
    history = release.plugin("history", "tiny-sd3")
    assert "served" in history
    # Its requests have ended, and so has it.
    release.kube.wait_gone("DiffusionModel", old, timeout=120)

    words = release.plugin("rollback", "tiny-sd3")
    assert "rolled back to revision" in words
    release.ready("tiny-sd3")
    assert release.models("tiny-sd3")["transformer"] == old
    assert pictures(release) == before
    load.wait_done(load.waiting + 1)
    # Never anything else, such as half of each.
    seen = load.pictures()
    assert seen == {seed: before[seed] | after[seed] for seed in seen}


@pytest.fixture
def one_gpu(cluster: Cluster) -> Iterator[None]:
    cluster.set_gpus("node1", 1)
    yield
    cluster.set_gpus("node1", 0)


def test_the_old_one_goes_first_where_there_is_one_accelerator(
    release: Release, one_gpu: None
) -> None:
    """A second transformer could not even be scheduled; requests wait for the new one."""
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    before = {"transformer": {**BEFORE["transformer"], **gpu, "tiling": False}}
    after = {"transformer": {**AFTER["transformer"], **gpu}}
    release.serve(tiny("tiny-sd3", before, strategy="Replace"))
    old = release.models("tiny-sd3")["transformer"]
    with Load(release.url, "tiny-sd3", rate=0.7, most=4, steps=20) as load:
        load.wait_done(2)
        release.serve(tiny("tiny-sd3", after, strategy="Replace"))
        load.wait_done(load.waiting + 1)
    assert not load.failures
    release.kube.wait_gone("DiffusionModel", old)
