# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a forward, counted by PyTorch on the meta device: no weights, no arithmetic.

A block's cost is a quadratic in the image tokens that it keeps (linear layers, plus attention over
kept tokens and text), so three counts give the cost of every table. Two ways of counting: *true*, 2
operations for each multiply-add; and the paper's *mixed* one, found by reproducing its figures, in
which linear layers count 1 for a multiply-add and attention 2.

    python -m shiva_kernels.flops

prints the paper's table: what it states, what is counted here, and the mean keep ratio at which the
counts meet.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shiva_kernels.apply import apply_shiva
from shiva_kernels.artifact import Artifact
from shiva_kernels.backbones import backbone_of, blocks_of
from shiva_kernels.config import ShivaConfig
from shiva_kernels.state import TrainingPlan
from shiva_kernels.tables import KTable

TERA = 1e12
_ATTENTION = ("bmm", "baddbmm", "scaled_dot_product", "attention")


@dataclass(frozen=True)
class Flops:
    """2 for each multiply-add, of linear layers (and convolutions) and of attention."""

    linear: float
    attention: float

    @property
    def true(self) -> float:
        return self.linear + self.attention

    @property
    def mixed(self) -> float:
        """The paper's: a linear layer's multiply-add counts 1."""
        return self.linear / 2 + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def scaled(self, by: float) -> Flops:
        return Flops(self.linear * by, self.attention * by)


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block with k image tokens: c0 + c1 k + c2 k^2, and of the dense block."""

    dense: Flops
    coefficients: tuple[Flops, Flops, Flops]

    def of(self, k: float) -> Flops:
        c0, c1, c2 = self.coefficients
        return c0 + c1.scaled(k) + c2.scaled(k * k)


@dataclass(frozen=True)
class CostModel:
    """Cost of a forward: everything around the blocks, and each block. `tokens` is N."""

    tokens: int
    around: Flops
    blocks: tuple[BlockCost, ...]

    @property
    def dense(self) -> Flops:
        return sum((block.dense for block in self.blocks), self.around)

    def of_row(self, row: Sequence[float]) -> Flops:
        """With k of each block, the router's own cost included where k < N."""
        total = self.around
        for block, k in zip(self.blocks, row, strict=True):
            total = total + (block.dense if k >= self.tokens else block.of(k))
        return total

    def of_table(self, table: KTable) -> Flops:
        """Mean over the steps."""
        rows = [self.of_row(row) for row in table.k]
        return sum(rows, Flops(0, 0)).scaled(1 / len(rows))

    def uniform(self, ratio: float) -> Flops:
        """Block 0 dense, the others at `ratio` of N."""
        return self.of_row((self.tokens, *(ratio * self.tokens for _ in self.blocks[1:])))

    def implied_ratio(self, flops: float, count: Callable[[Flops], float]) -> float:
        """The uniform keep ratio at which `count` gives `flops`; nan where none does."""
        low, high = 0.0, 1.0 - 1e-9
        if not count(self.uniform(low)) <= flops <= count(self.uniform(high)):
            return math.nan
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if count(self.uniform(middle)) < flops else (low, middle)
        return high


def cost_model(transformer: Any, rows: int, size: tuple[int, int], text: int) -> CostModel:
    """Of a forward with `rows` rows, latents of `size` (height, width), `text` text tokens.

    `transformer` gives its configuration only and is not touched.
    """
    with torch.device("meta"):
        copy = type(transformer).from_config(dict(transformer.config)).eval()
        arguments = backbone_of(copy).example(copy, rows, size, text)
        artifact = Artifact.untrained(copy, tokens=1, sigmas=(1.0,))
    for module in (copy, artifact.router):
        module.requires_grad_(False)
    handle = apply_shiva(copy, ShivaConfig(artifact, None))
    count = len(blocks_of(copy))
    seen: list[int] = []
    blocks_of(copy)[0][1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs.get("hidden_states", *args[:1])).shape[1]),
        with_kwargs=True,
    )

    def counted(k: int | None) -> tuple[Flops, list[Flops]]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if k is None:
                copy(**arguments)
            else:
                with handle.training(TrainingPlan(k=[k] * (count - 1))):
                    copy(**arguments)
        counts = counter.get_flop_counts()
        whole = _split(copy, type(copy).__name__, counts, counts["Global"])
        prefix = f"{type(copy).__name__}."
        return whole, [_split(block, prefix + name, counts) for name, block in blocks_of(copy)]

    whole, dense = counted(None)
    tokens = seen[0]
    ks = (tokens // 4, tokens // 2, 3 * tokens // 4)
    at = [counted(k)[1] for k in ks]
    around = whole + sum(dense, Flops(0, 0)).scaled(-1)
    blocks = [
        BlockCost(cost, _quadratic(ks, [blocks[i] for blocks in at]))
        for i, cost in enumerate(dense)
    ]
    return CostModel(tokens, around, tuple(blocks))


def _split(
    module: torch.nn.Module,
    name: str,
    counts: dict[str, dict[Any, int]],
    own: dict[Any, int] | None = None,
) -> Flops:
    """Batched products are attention's, but for those of linear layers whose input is strided."""
    own = own if own is not None else counts[name]
    attention = _batched(own) - sum(
        _batched(counts.get(f"{name}.{child}", {}))
        for child, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    )
    return Flops(sum(own.values()) - attention, attention)


def _batched(counts: dict[Any, int]) -> int:
    return sum(n for op, n in counts.items() if any(part in str(op) for part in _ATTENTION))


def _quadratic(ks: tuple[int, int, int], costs: list[Flops]) -> tuple[Flops, Flops, Flops]:
    """Through three points, exactly."""
    system = torch.tensor([[1.0, k, k * k] for k in ks], dtype=torch.float64)
    values = torch.tensor([[c.linear, c.attention] for c in costs], dtype=torch.float64)
    solved = torch.linalg.solve(system, values).tolist()
    return Flops(*solved[0]), Flops(*solved[1]), Flops(*solved[2])


# ------------------------------------------------------------------------ the paper's table


@dataclass(frozen=True)
class Setting:
    """A backbone as the paper ran it at 1024 x 1024; `stated` are its TFLOPs by what it ran."""

    name: str
    make: Callable[[], Any]
    rows: int
    text: int
    stated: dict[str, float]


def _sd3(layers: tuple[int, ...] = (), norm: str | None = None, table: int = 192) -> Any:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=table,
        dual_attention_layers=layers,
        qk_norm=norm,
    )


def _flux() -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def _pixart() -> Any:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, use_additional_conditions=False
    )


SETTINGS = (
    Setting(
        "SD3-Medium, guided",
        _sd3,
        rows=2,
        text=333,
        stated={"dense": 11.80, "0.8": 8.92, "0.6": 6.96},
    ),
    Setting(
        "SD3.5-Medium, guided",
        lambda: _sd3(tuple(range(13)), "rms_norm", 384),
        rows=2,
        text=333,
        stated={"dense": 11.80},
    ),
    Setting("Flux.1-dev", _flux, rows=1, text=512, stated={"dense": 44.63, "0.8": 33.93}),
    Setting("PixArt-Sigma, guided", _pixart, rows=2, text=300, stated={"dense": 12.97}),
)


def paper_table(settings: Sequence[Setting] = SETTINGS) -> list[tuple[str, ...]]:
    """Rows: backbone, budget, stated T, mixed T, true T, % saved (mixed), implied keep ratio."""
    rows: list[tuple[str, ...]] = []
    for setting in settings:
        with torch.device("meta"):
            transformer = setting.make()
        model = cost_model(transformer, setting.rows, (128, 128), setting.text)
        dense = model.dense
        for budget in ("dense", "0.8", "0.6"):
            cost = dense if budget == "dense" else model.uniform(float(budget))
            stated = setting.stated.get(budget)
            implied = ""
            if stated is not None and budget != "dense":
                implied = f"{model.implied_ratio(stated * TERA, lambda f: f.mixed):.3f}"
            rows.append(
                (
                    setting.name,
                    budget,
                    f"{stated:.2f}" if stated is not None else "",
                    f"{cost.mixed / TERA:.2f}",
                    f"{cost.true / TERA:.2f}",
                    f"{100 * (1 - cost.mixed / dense.mixed):.1f}",
                    implied,
                )
            )
    return rows


COLUMNS = ("backbone", "budget", "paper T", "mixed T", "true T", "saved %", "implied ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's FLOPs, counted")
    parser.add_argument("--markdown", action="store_true", help="a table for a page")
    args = parser.parse_args()
    rows = [COLUMNS, *paper_table()]
    if args.markdown:
        rows.insert(1, tuple("---" for _ in COLUMNS))
        print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
