# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A transformer planned with `compile: default` has its graphs before its first request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_artifacts import make_artifact

from kubediffusion import models
from kubediffusion.errors import UnsupportedModel
from kubediffusion.models import pruning
from kubediffusion.models.base import LoadSpec, Model, StepCache

SpecOf = Callable[..., LoadSpec]
# Two kinds of blocks, each for some rows and texts, for any of both, and for a single row.
GRAPHS = 6


def traced(graph: Any, example_inputs: Any) -> Any:
    """In inductor's place: the graph as it was traced."""
    return graph


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def artifact(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(pristine, tmp_path_factory.mktemp("artifact"))


def inputs(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompts: dict[str, Any] = {}
    for branch in ("prompt", "negative"):
        for i, width in ((1, 32), (2, 48)):
            prompts[f"{branch}_{i}.embeds"] = torch.randn(1, 7, width, generator=generator)
            prompts[f"{branch}_{i}.pooled"] = torch.randn(1, width, generator=generator)
    size = {"width": 32, "height": 32}
    numbers = {"guidance": 4.0, "max_sequence_length": 8, "seed": 1, "steps": 3}
    return {**prompts, **size, **numbers, **changes}


def drawn(
    model: Any,
    budget: float | None,
    count: int = 1,
    step_cache: StepCache | None = None,
    **changes: Any,
) -> torch.Tensor:
    """Latents of the first of `count` leases that go together."""
    given = inputs(**changes)
    leases = [model.start(given, budget=budget, step_cache=step_cache) for _ in range(count)]
    while leases[0].step < leases[0].total_steps:
        model.advance(leases)
    return leases[0].latents


def loaded(spec: LoadSpec) -> Model:
    return models.load(spec)


def test_no_request_of_any_shape_or_budget_waits_for_a_compiler(
    pristine: Path, artifact: Path, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "compile_blocks", partial(pruning.compile_blocks, backend=traced))
    options = {"compile": "default"}
    compiled: Any = loaded(spec_of(pristine, "transformer", pruning_path=artifact, options=options))
    eager = loaded(spec_of(pristine, "transformer", pruning_path=artifact))
    assert compiled.measures.graphs == GRAPHS
    requests: list[tuple[float | None, int, dict[str, Any]]] = [
        (None, 1, {}),
        (0.6, 1, {}),
        (0.4, 3, {}),
        (0.8, 1, {"width": 48}),
        (0.6, 1, {"max_sequence_length": 77}),
        (0.6, 1, {"guidance": 1.0}),
        (0.6, 2, {"guidance": 1.0, "steps": 5}),
    ]
    for budget, count, changes in requests:
        ours, theirs = (drawn(each, budget, count, **changes) for each in (compiled, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    cache = StepCache("magcache", 1.0, (1.0, 1.0))
    ours, theirs = (drawn(each, 0.6, step_cache=cache, steps=5) for each in (compiled, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert compiled.measures.steps_reused == 3
    assert compiled.measures.graphs == GRAPHS
    assert compiled.measures.tokens_kept > 0


def test_a_model_without_an_artifact_is_compiled_too(
    pristine: Path, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "compile_blocks", partial(pruning.compile_blocks, backend=traced))
    monkeypatch.setattr(pruning, "_WARM_UP", pruning._WARM_UP[:1])
    compiled: Any = loaded(spec_of(pristine, "transformer", options={"compile": "default"}))
    assert compiled.measures.graphs == 2
    assert "budgets" not in compiled.facts
    own = loaded(spec_of(pristine, "transformer"))
    ours, theirs = drawn(compiled, None), drawn(own, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_cache_that_others_may_write_to_is_not_run(
    pristine: Path, spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "compile_blocks", partial(pruning.compile_blocks, backend=traced))
    monkeypatch.setattr(pruning, "_WARM_UP", ())
    spec = spec_of(pristine, "transformer", options={"compile": "default"}, compile_cache=tmp_path)
    loaded(spec)
    (folder,) = tmp_path.iterdir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    folder.chmod(0o777)
    with pytest.raises(UnsupportedModel, match="others can write") as info:
        loaded(spec)
    assert info.value.field == "compile"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_start_finds_the_compiled_code_of_the_first(
    pristine: Path, spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inductor and a C++ compiler: minutes on a busy machine."""
    monkeypatch.setattr(pruning, "_WARM_UP", pruning._WARM_UP[:1])
    options = {"compile": "default"}
    spec = spec_of(pristine, "transformer", options=options, compile_cache=tmp_path)
    first: Any = loaded(spec)
    torch._dynamo.reset()
    second: Any = loaded(spec)
    assert second.measures.graphs == first.measures.graphs == 2
    assert second.measures.compile_seconds < first.measures.compile_seconds / 2
