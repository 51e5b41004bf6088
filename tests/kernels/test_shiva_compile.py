# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import SIGMAS, TOKENS, call, inputs, pruned

from shiva_kernels import Guidance, Unsupported
from shiva_kernels.compile import CompiledBlocks, Shapes, cache_key, compile_blocks, use_cache


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def uncompiled(graph: Any, example_inputs: Any) -> Any:
    """A backend that costs nothing: what counts here is Dynamo's graphs."""
    return graph


def test_blocks_of_a_kind_share_one_graph_over_all_steps_and_budgets() -> None:
    """SD3: blocks 0 to 3 are one kind, the last, which drops its text, is another."""
    transformer, handle = pruned()
    eager = {s: call(transformer, inputs("sd3", 2, s)) for s in SIGMAS}
    compiled = compile_blocks(handle, backend=uncompiled)
    ks = set()
    for sigma in SIGMAS:
        out = call(transformer, inputs("sd3", 2, sigma))
        assert torch.allclose(out, eager[sigma], atol=1e-4)
        ks |= set(handle.table(0.6, SIGMAS, TOKENS).row(sigma))
    with handle.request(0.4).step(0.5):
        call(transformer, inputs("sd3", 2))
    assert len(ks) > 8
    assert compiled.graphs == 2
    compiled.remove()
    assert torch.equal(call(transformer, inputs("sd3", 2)), eager[0.5])


def test_cuda_graphs_are_for_gpus_and_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, handle = pruned()
    with pytest.raises(Unsupported, match="on a GPU, and this is on cpu"):
        compile_blocks(handle, backend=uncompiled, cuda_graphs=True)
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    assert not compile_blocks(handle, backend=uncompiled).cuda_graphs
    call(transformer, inputs("sd3", 2))
    assert not begun
    # As on a GPU, as far as that goes without one: each call of the transformer begins anew.
    CompiledBlocks(handle, Shapes.DYNAMIC, uncompiled, cuda_graphs=True)
    for _ in range(2):
        call(transformer, inputs("sd3", 2))
    assert len(begun) == 2


def test_on_a_gpu_inductor_is_told_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def compile_fx(graph: Any, example_inputs: Any, config_patches: dict[str, Any]) -> Any:
        told.append(config_patches)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    transformer, handle = pruned()
    CompiledBlocks(handle, Shapes.DYNAMIC, cuda_graphs=True)
    call(transformer, inputs("sd3", 2))
    assert [patches["triton.cudagraphs"] for patches in told] == [True, True]
    with torch._inductor.config.patch(told[0]):  # names that inductor knows
        assert torch._inductor.config.triton.cudagraphs


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("flux", 2), pytest.param("sd35", 3, marks=pytest.mark.slow), ("pixart", 1)],
)
def test_the_other_backbones_have_a_graph_for_each_kind(name: str, kinds: int) -> None:
    transformer, handle = pruned(name)
    compiled = compile_blocks(handle, backend=uncompiled)
    for sigma in (1.0, 0.5, 0.25):
        with handle.request(guidance=Guidance.SEQUENTIAL).step(sigma):
            call(transformer, inputs(name, 1, sigma))
    assert compiled.graphs == kinds


def test_warming_up_compiles_all_that_a_request_needs() -> None:
    transformer, handle = pruned()
    compiled = compile_blocks(handle, backend=uncompiled)
    assert compiled.warm_up(2, (16, 16), 5, inference_mode=False) == 2
    for budget in (0.8, 0.6, 0.4, None):
        with handle.request(budget).step(0.5):
            call(transformer, inputs("sd3", 2))
    assert compiled.graphs == 2


def test_a_graph_for_each_k_is_never_silently_eager() -> None:
    transformer, handle = pruned()
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = compile_blocks(handle, Shapes.PER_K, expected_graphs=2, backend=uncompiled)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            [call(transformer, inputs("sd3", 2, sigma)) for sigma in SIGMAS]
    assert compiled.graphs == 2


@pytest.mark.slow
def test_inductor_computes_the_same(tmp_path: Path) -> None:
    transformer, handle = pruned()
    eager = call(transformer, inputs("sd3", 2))
    compiled = compile_blocks(handle)
    assert torch.allclose(call(transformer, inputs("sd3", 2)), eager, atol=1e-3, rtol=1e-3)
    assert compiled.seconds > 0


def test_the_cache_is_named_by_what_its_code_depends_on(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert cache_key("a", cpu) == cache_key("a", cpu) != cache_key("b", cpu)
    folder = use_cache(tmp_path, "a", cpu)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    folder.chmod(0o777)
    with pytest.raises(Unsupported, match="others can write"):
        use_cache(tmp_path, "a", cpu)
