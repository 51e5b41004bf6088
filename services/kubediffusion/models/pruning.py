# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Token pruning of a denoiser: an artifact of `shiva_kernels` merged at load, leases under budgets.

Three models come of one set of weights, and their names are kept apart:

    the own dense model          no artifact: the pipeline's weights, every token
    the artifact's dense model   its adapter merged into the weights, every token: budget 1
    a pruned request             the same weights, k[step][block] tokens by its budget's table

A lease holds its request's budget and sigma grid and nothing else: each step selects anew, so that
leases interleave, stop at any boundary, and go on from a checkpoint with the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import LoadSpec, Measures
from kubediffusion.models.loading import first_line, nbytes_of
from shiva_kernels.apply import ShivaHandle, apply_shiva
from shiva_kernels.artifact import Artifact
from shiva_kernels.compile import CompiledBlocks, compile_blocks, use_cache
from shiva_kernels.config import Guidance, ShivaConfig
from shiva_kernels.errors import ArtifactMismatch, ShivaError, Unsupported
from shiva_kernels.state import PruningRequest

FIELD = "budget"
# (rows, text tokens) of the calls that compile: a guided request's, two such, an unguided one's.
# What differs between the first two torch leaves open from then on: any number of either. One row
# is always a graph of its own.
_WARM_UP = ((2, 77 + 256), (4, 77 + 128), (1, 77 + 128))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeasePruning:
    """How one lease is pruned; `request` is None where it keeps all `tokens`."""

    request: PruningRequest | None
    tokens: int

    def row(self, sigma: float) -> tuple[int, ...] | None:
        """k of each block at noise level `sigma`; None for all tokens."""
        return self.request.row(sigma, self.tokens) if self.request is not None else None


class Pruning:
    """What `spec` asks of `module` beyond its weights: a pruning artifact, compiled blocks.

    Made right after loading: quantisation and users' LoRAs go on top. Raises UnsupportedModel.
    """

    def __init__(self, spec: LoadSpec, module: Any) -> None:
        self.measures = Measures()
        self._artifact = _artifact(spec)
        self._handle: ShivaHandle | None = None
        self._compiled: CompiledBlocks | None = None
        if self._artifact is not None or "compile" in spec.options:
            self._handle = _applied(module, self._artifact)
        if self._handle is not None and "compile" in spec.options:
            if spec.options["compile"] != "default":
                raise UnsupportedModel(
                    f"{spec.options['compile']!r} is no mode of compiling that this family offers; "
                    "use default",
                    field="compile",
                )
            self._compiled = _compiled(spec, self._handle)
            self._measure_compiler()

    @property
    def facts(self) -> Mapping[str, str | int]:
        """For gateways: the budgets that can be asked for besides 1, and the number of blocks."""
        if self._artifact is None or self._handle is None:
            return {}
        budgets = ",".join(f"{each:g}" for each in sorted(self._artifact.tables, reverse=True))
        return {"budgets": budgets, "blocks": self._handle.block_count}

    @property
    def nbytes(self) -> int:
        """What there is beside the transformer's own weights."""
        return nbytes_of(self._artifact.router) if self._artifact is not None else 0

    def of(
        self, budget: float | None, *, sigmas: Sequence[float], tokens: int, guided: bool
    ) -> LeasePruning:
        """For a lease of `tokens` image tokens. `sigmas` is its request's full grid, also where the
        lease runs a part of it. Raises InvalidInput."""
        if budget is None:
            return LeasePruning(None, tokens)
        if self._artifact is None or self._handle is None:
            raise InvalidInput("this transformer has no pruning artifact", field=FIELD)
        try:
            request = self._handle.request(
                budget, sigmas=sigmas, guidance=Guidance.PAIR if guided else Guidance.NONE
            )
            request.row(1.0, tokens)
        except ShivaError as error:
            raise InvalidInput(str(error), field=FIELD) from None
        return LeasePruning(request, tokens)

    @contextmanager
    def step(self, members: Sequence[tuple[LeasePruning, float]]) -> Iterator[None]:
        """Around one call of the transformer for these (lease, sigma), which are at equal rows."""
        pruned = [(lease.request, sigma) for lease, sigma in members if lease.request is not None]
        if not pruned or self._handle is None:
            yield
        else:
            with self._handle.together(pruned):
                yield
        if self._compiled is not None:
            self._measure_compiler()

    def count(self, members: Sequence[tuple[LeasePruning, float]], *, computed: bool) -> None:
        """The tokens of a step; one that a step cache left out computed none."""
        rows = [(lease.tokens, lease.row(sigma)) for lease, sigma in members]
        seen = sum((len(row) - 1) * tokens for tokens, row in rows if row is not None)
        kept = sum(sum(row[1:]) for _, row in rows if row is not None) if computed else 0
        self.measures = replace(
            self.measures,
            tokens_seen=self.measures.tokens_seen + seen,
            tokens_kept=self.measures.tokens_kept + kept,
        )

    def _measure_compiler(self) -> None:
        if self._compiled is not None:
            self.measures = replace(
                self.measures,
                graphs=self._compiled.graphs,
                compile_seconds=self._compiled.seconds,
            )


def _artifact(spec: LoadSpec) -> Artifact | None:
    if spec.pruning_path is None:
        return None
    try:
        return Artifact.load(spec.pruning_path)
    except (ShivaError, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"the pruning artifact cannot be read: {first_line(error)}; fetch or export it again",
            field="pruning.artifact",
            reason="BadWeights",
        ) from error


def _applied(module: Any, artifact: Artifact | None) -> ShivaHandle:
    """Without an artifact, hooks that let everything pass: compiled blocks need them."""
    carrier = artifact or Artifact.untrained(module, tokens=1, sigmas=(1.0,), budgets=())
    try:
        # A node that wants the own dense model back loads it again: no copy is kept.
        handle = apply_shiva(module, ShivaConfig(carrier, None, keep_dense=False))
    except (ArtifactMismatch, Unsupported) as error:
        raise UnsupportedModel(
            f"the pruning artifact does not belong to this transformer: {error}",
            field="pruning.artifact",
            reason="WrongArchitecture",
        ) from error
    handle.router.to(module.device).eval().requires_grad_(False)
    carrier.adapter = None  # it is in the weights now
    return handle


def _compiled(spec: LoadSpec, handle: ShivaHandle) -> CompiledBlocks:
    """Compiled and called for each kind of batch, so that no request waits for a compiler."""
    config = handle.transformer.config
    try:
        if spec.compile_cache is not None:
            use_cache(spec.compile_cache, spec.identity, handle.transformer.device)
        compiled = compile_blocks(handle)
        size = (config.sample_size, config.sample_size)
        for rows, text in _WARM_UP:
            compiled.warm_up(rows, size, text)
    except Unsupported as error:
        raise UnsupportedModel(str(error), field="compile") from error
    log.info("compiled %d graphs in %.1f s", compiled.graphs, compiled.seconds)
    return compiled
