# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`make bench-gpu` before there is a GPU: its contests are right, and it says what it lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted import run_python

from benchmarks.kernels import gpu


def test_every_contest_is_between_equals_and_a_wrong_one_is_caught(monkeypatch):
    monkeypatch.setattr(gpu, "SHAPES", {"small": (2, 17, 6)})
    contests = [c for _, c in gpu.contests(torch.bfloat16, torch.device("cpu"))]
    assert [c.name for c in contests] == ["soft_rank", "gather_tokens", "scatter_tokens"]
    for contest in contests:
        gpu.check(contest)
        wrong = replace(contest, ours=lambda *a, peer=contest.peer: 1.01 * peer(*a))
        with pytest.raises(AssertionError, match=contest.name):
            gpu.check(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(AssertionError, match="PyTorch sees no CUDA device here"):
        run_python("-m", "benchmarks.kernels.gpu")
