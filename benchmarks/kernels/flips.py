# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The flip test: does a gradient estimator know which tokens are worth keeping?

python -m benchmarks.kernels.flips [--tokens 4000] [--out benchmarks/results/kernels_flips.csv]

For one token of one pruned block the truth can be computed: let the token change sides, all others
staying where they are, run the network again, and take the difference of the losses. The *benefit*
of a token is the loss with it rejected minus the loss with it kept. Descent promotes a token where
dL/dpi < 0, so an estimator is right where -dL/dpi has the benefit's sign, and useful where it has
the benefit's order.

Selections are random (top-k of Gaussian scores, keep ratio 0.6), in every block but the first
(`all`) or in one block at a time (`one`). The loss is the mean squared error to the network's own
dense output. Figures are means over (sample, block); the error beside each is the standard error
over samples, since the blocks of a sample see the same picture.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS
from shiva_kernels.estimators import (
    Estimator,
    Surrogate,
    gate_input,
    gate_output,
    soft_selection,
)
from shiva_kernels.ops import gather_tokens, scatter_tokens

OUT = RESULTS / "kernels_flips.csv"
KEEP = 0.6
CHUNK = 64  # flips that run as one batch
Rest = tuple[Tensor, ...]


class Network(Protocol):
    """A stack of blocks on tokens x [B, N, D]; `rest` is what else they read, first dimension B."""

    depth: int

    def block(self, layer: int, x: Tensor, rest: Rest) -> tuple[Tensor, Rest]: ...

    def finish(self, x: Tensor, rest: Rest) -> Tensor: ...


@dataclass(frozen=True)
class State:
    """What enters a block."""

    x: Tensor
    rest: Rest

    def repeated(self, times: int) -> State:
        return State(
            self.x.expand(times, -1, -1),
            tuple(t.expand(times, *t.shape[1:]) for t in self.rest),
        )


Step = Callable[[int, State], State]


def dense_step(network: Network) -> Step:
    return lambda layer, state: State(*network.block(layer, state.x, state.rest))


def pruned_step(network: Network, selections: Mapping[int, Tensor]) -> Step:
    """`selections[layer]` are the kept tokens [1, k] or [B, k] of a pruned block."""

    def step(layer: int, state: State) -> State:
        if layer not in selections:
            return dense_step(network)(layer, state)
        index = selections[layer].expand(state.x.shape[0], -1)
        y, rest = network.block(layer, gather_tokens(state.x, index), state.rest)
        return State(scatter_tokens(state.x, index, y), rest)

    return step


def walk(network: Network, state: State, step: Step, first: int = 0) -> Iterator[State]:
    """The states from block `first` on: what enters it, and what leaves each block after."""
    yield state
    for layer in range(first, network.depth):
        state = step(layer, state)
        yield state


def losses(network: Network, state: State, step: Step, first: int, target: Tensor) -> Tensor:
    """The mean squared error to `target` of each sequence of the batch."""
    *_, last = walk(network, state, step, first)
    return (network.finish(last.x, last.rest) - target).square().mean(dim=(1, 2))


def benefits(
    network: Network, entering: State, layer: int, selections: Mapping[int, Tensor], target: Tensor
) -> Tensor:
    """The exact benefit [N] of keeping each token in block `layer`, the others as selected."""
    tokens = torch.arange(entering.x.shape[1])
    kept = selections[layer][0]
    rejected = tokens[~torch.isin(tokens, kept)]

    def of(variants: Tensor) -> Tensor:
        found = []
        for part in variants.split(CHUNK):
            step = pruned_step(network, {**selections, layer: part})
            state = entering.repeated(len(part))
            found.append(losses(network, state, step, layer, target))
        return torch.cat(found)

    with torch.no_grad():
        here = of(kept[None])
        others = ~torch.eye(len(kept), dtype=torch.bool)
        without = of(kept.expand(len(kept), -1)[others].view(len(kept), -1))
        added = of(torch.cat([kept.expand(len(rejected), -1), rejected[:, None]], dim=1))
    out = torch.empty(len(tokens))
    out[kept], out[rejected] = without - here, here - added
    return out


@dataclass(frozen=True)
class Gradients:
    """What an arm says of one block: dL/dpi [N], dL/ds [N], dL/dk."""

    pi: Tensor
    scores: Tensor
    k: Tensor


def gradients(
    network: Network,
    start: State,
    scores: Mapping[int, Tensor],
    selections: Mapping[int, Tensor],
    surrogate: Surrogate,
    teacher: list[State],
    target: Tensor,
) -> dict[int, Gradients]:
    """One forward and one backward of the pruned network with the arm's gates, for every block."""
    leaves = {
        layer: (s.clone().requires_grad_(), torch.tensor(KEEP * s.shape[1], requires_grad=True))
        for layer, s in scores.items()
    }
    soft = {layer: soft_selection(s, k, surrogate) for layer, (s, k) in leaves.items()}
    arm = surrogate.estimator

    def step(layer: int, state: State) -> State:
        if layer not in selections:
            return dense_step(network)(layer, state)
        index, pi = selections[layer], soft[layer]
        kept = torch.zeros_like(pi, dtype=torch.bool).scatter(1, index, True)
        x = gate_input(state.x, pi, kept, arm)
        y, rest = network.block(layer, gather_tokens(x, index), state.rest)
        delta = teacher[layer + 1].x - teacher[layer].x
        out = scatter_tokens(x, index, y)
        return State(gate_output(x, out, pi, kept, arm, teacher_delta=delta), rest)

    loss = losses(network, start, step, 0, target).sum()
    flat = [t for layer in leaves for t in (soft[layer], *leaves[layer])]
    found = torch.autograd.grad(loss, flat)
    return {
        layer: Gradients(found[3 * i][0], found[3 * i + 1][0], found[3 * i + 2])
        for i, layer in enumerate(leaves)
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; NaN where either is constant: an arm that says nothing has no order."""
    from scipy.stats import rankdata

    if a.min() == a.max() or b.min() == b.max():
        return math.nan
    ranks = [torch.from_numpy(rankdata(t.numpy())) for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def agreement(claimed: Tensor, true: Tensor) -> float:
    """The share of equal signs among the tokens of which the arm says something; NaN if none."""
    said = claimed != 0
    return float((claimed[said].sign() == true[said].sign()).double().mean()) if any(said) else NAN


NAN = math.nan
NORM = "teacher-norm"
ARMS = (*(arm.value for arm in Estimator), NORM)


@dataclass(frozen=True)
class Verdict:
    """An arm on one block of one sample. Signs are shares of tokens, ranks Spearman's."""

    sign_kept: float
    sign_rejected: float
    rank_kept: float
    rank_rejected: float
    rank_all: float
    rank_scores: float  # of -dL/ds: through the soft selection, which is what a router learns from
    sign_k: float  # whether dL/dk has the sign that the exact benefits give it


def judge(found: Gradients, true: Tensor, kept: Tensor, k_weight: Tensor) -> Verdict:
    """`kept` bool [N]; `k_weight` [N] is dpi/dk, with which dL/dk sums up the tokens."""
    claimed = -found.pi
    k_true = float((true * k_weight).sum())
    return Verdict(
        agreement(claimed[kept], true[kept]),
        agreement(claimed[~kept], true[~kept]),
        rank_correlation(claimed[kept], true[kept]),
        rank_correlation(claimed[~kept], true[~kept]),
        rank_correlation(claimed, true),
        rank_correlation(-found.scores, true),
        NAN if found.k == 0 else float((float(-found.k) > 0) == (k_true > 0)),
    )


@dataclass(frozen=True)
class Flips:
    """All verdicts of a run: (arm, sample) -> one for each block, and the benefits themselves.

    Beside the arms, `NORM`: tokens ordered by the norm of what the teacher's block adds to them. It
    is no gradient and has no sign; an arm that orders worse learns less than this score knows.
    """

    verdicts: dict[tuple[str, int], list[Verdict]]
    benefits: list[Tensor]
    kept: list[Tensor]


def flip_test(
    cases: Iterable[tuple[Network, State]], regime: str, seed: int = 0, tau: float = 0.2
) -> Flips:
    """Flip every token of every block but the first; `regime` is `all` or `one` pruned block."""
    generator = torch.Generator().manual_seed(seed)
    out = Flips({}, [], [])
    for sample, (network, start) in enumerate(cases):
        with torch.no_grad():
            teacher = list(walk(network, start, dense_step(network)))
            target = network.finish(teacher[-1].x, teacher[-1].rest)
        tokens = start.x.shape[1]
        layers = range(1, network.depth)
        scores = {n: torch.randn(1, tokens, generator=generator) for n in layers}
        for group in [list(layers)] if regime == "all" else [[n] for n in layers]:
            some = {n: scores[n] for n in group}
            _one_group(out, sample, network, start, some, teacher, target, tau)
    return out


def _one_group(
    out: Flips,
    sample: int,
    network: Network,
    start: State,
    scores: dict[int, Tensor],
    teacher: list[State],
    target: Tensor,
    tau: float,
) -> None:
    k = int(KEEP * start.x.shape[1])
    selections = {n: s.topk(k, dim=1).indices.sort(dim=1).values for n, s in scores.items()}
    with torch.no_grad():
        entering = list(walk(network, start, pruned_step(network, selections)))
    found = {
        arm: gradients(network, start, scores, selections, Surrogate(arm, tau), teacher, target)
        for arm in Estimator
    }
    for layer, s in scores.items():
        true = benefits(network, entering[layer], layer, selections, target)
        kept = torch.zeros(s.shape[1], dtype=torch.bool)
        kept[selections[layer][0]] = True
        out.benefits.append(true)
        out.kept.append(kept)
        for arm in Estimator:
            one = torch.tensor(KEEP * s.shape[1], requires_grad=True)
            pi = soft_selection(s, one, replace(Surrogate(), tau_rank=tau))[0].detach()
            verdict = judge(found[arm][layer], true, kept, pi * (1 - pi))
            out.verdicts.setdefault((arm.value, sample), []).append(verdict)
        norm = (teacher[layer + 1].x - teacher[layer].x).norm(dim=2)[0]
        of_kept, of_rejected = (rank_correlation(norm[m], true[m]) for m in (kept, ~kept))
        overall = rank_correlation(norm, true)
        verdict = Verdict(NAN, NAN, of_kept, of_rejected, overall, overall, NAN)
        out.verdicts.setdefault((NORM, sample), []).append(verdict)


def summary(flips: Flips) -> Iterator[tuple[str, str, float, float]]:
    """(arm, figure, mean, standard error over samples)."""
    for arm in ARMS:
        samples = [v for (a, _), v in flips.verdicts.items() if a == arm]
        for figure in Verdict.__dataclass_fields__:
            table = [torch.tensor([getattr(v, figure) for v in s]).nanmean() for s in samples]
            values = torch.stack(table)
            values = values[~values.isnan()]
            if len(values) == 0:
                yield arm, figure, NAN, NAN
            else:
                error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else NAN
                yield arm, figure, float(values.mean()), error


class RandomNetwork(nn.Module):
    """Pre-LN transformer blocks with random weights: nothing that training put there."""

    def __init__(self, seed: int, depth: int = 4, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.depth, self.heads = depth, heads
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / columns**0.5)

        shapes = {"qkv": (3, 1), "proj": (1, 1), "up": (4, 1), "down": (1, 4)}
        self.layers = nn.ModuleList(
            nn.ParameterDict({k: matrix(a * width, b * width) for k, (a, b) in shapes.items()})
            for _ in range(depth)
        ).requires_grad_(False)

    def block(self, layer: int, x: Tensor, rest: Rest) -> tuple[Tensor, Rest]:
        weights: Any = self.layers[layer]
        functional = nn.functional
        batch, tokens, width = x.shape
        qkv = functional.layer_norm(x, (width,)) @ weights["qkv"].T
        heads = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads)
        x = x + mixed.transpose(1, 2).reshape(batch, tokens, width) @ weights["proj"].T
        hidden = functional.gelu(functional.layer_norm(x, (width,)) @ weights["up"].T)
        return x + hidden @ weights["down"].T, rest

    def finish(self, x: Tensor, rest: Rest) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[2:])


def random_cases(count: int, tokens: int = 48) -> Iterator[tuple[Network, State]]:
    for seed in range(count):
        network = RandomNetwork(seed)
        generator = torch.Generator().manual_seed(seed)
        yield network, State(torch.randn(1, tokens, 64, generator=generator), ())


class TinySD3:
    """The transformer of `models/tiny-sd3`: trained weights, 64 image tokens, text always kept."""

    PROMPTS = (
        "a red circle above a blue square",
        "a green circle left of a yellow triangle",
        "a small purple square in the center",
        "a large orange cross in the top left corner",
    )
    STEPS, T5_TOKENS = 28, 32

    def __init__(self, folder: Path) -> None:
        from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]

        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            folder, torch_dtype=torch.float32
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        self.depth = len(self.transformer.transformer_blocks)

    def block(self, layer: int, x: Tensor, rest: Rest) -> tuple[Tensor, Rest]:
        text, time = rest
        block = self.transformer.transformer_blocks[layer]
        new, x = block(hidden_states=x, encoder_hidden_states=text, temb=time)
        return x, (text if new is None else new, time)

    def finish(self, x: Tensor, rest: Rest) -> Tensor:
        return self.transformer.proj_out(self.transformer.norm_out(x, rest[1]))

    @torch.no_grad()
    def start(self, latents: Tensor, step: int, prompt: str) -> State:
        """What enters block 0: the transformer's own forward up to there."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, prompt, prompt, max_sequence_length=self.T5_TOKENS
        )
        inner = self.transformer
        time = self.pipeline.scheduler.timesteps[step].expand(1)
        x = inner.pos_embed(latents).contiguous()
        return State(x, (inner.context_embedder(text), inner.time_text_embed(time, pooled)))

    def cases(self, count: int) -> Iterator[tuple[Network, State]]:
        """The states of `count` denoising steps, spread over prompts and the whole sampling."""
        each = math.ceil(count / len(self.PROMPTS))
        wanted = [round((i + 0.5) / each * (self.STEPS - 1)) for i in range(each)]
        for seed, prompt in enumerate(self.PROMPTS):
            seen: dict[int, Tensor] = {}

            def record(_: Any, step: int, __: Any, values: dict[str, Tensor], to=seen) -> dict:
                to[step + 1] = values["latents"].clone()
                return values

            self.pipeline(
                prompt,
                num_inference_steps=self.STEPS,
                guidance_scale=4.0,
                max_sequence_length=self.T5_TOKENS,
                height=128,
                width=128,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=record,
                output_type="latent",
            )
            for step in wanted:
                yield self, self.start(seen[max(step, 1)], max(step, 1), prompt)


def rows_of(name: str, regime: str, flips: Flips) -> list[dict[str, Any]]:
    """A row of the results for each arm; prints them too."""
    benefit, kept = torch.cat(flips.benefits), torch.cat(flips.kept)
    good = [float((benefit[side] > 0).double().mean()) for side in (kept, ~kept)]
    print(
        f"\n{name}, {regime}: {len(benefit)} tokens; keeping it is right for "
        f"{good[0]:.1%} of the kept and {good[1]:.1%} of the rejected"
    )
    head = {
        "network": name,
        "pruned": regime,
        "tokens": len(benefit),
        "good_kept": f"{good[0]:.4f}",
        "good_rejected": f"{good[1]:.4f}",
    }
    rows: dict[str, dict[str, Any]] = {arm: {**head, "arm": arm} for arm in ARMS}
    for arm, figure, mean, error in summary(flips):
        rows[arm] |= {figure: f"{mean:.4f}", f"{figure}_error": f"{error:.4f}"}
    for arm, row in rows.items():
        figures = [f"{figure} {row[figure]}" for figure in Verdict.__dataclass_fields__]
        print(f"  {arm:<17}", "  ".join(figures), flush=True)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4000, help="flips, at least, for each row")
    parser.add_argument("--pipeline", type=Path, default=Path("models/tiny-sd3/pipeline"))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    tiny = TinySD3(arguments.pipeline)
    networks: dict[str, Callable[[int], Iterable[tuple[Network, State]]]] = {
        "random": random_cases,
        "tiny-sd3": tiny.cases,
    }
    flips_a_sample = {"random": 3 * 48, "tiny-sd3": (tiny.depth - 1) * 64}
    rows: list[dict[str, Any]] = []
    for name, cases in networks.items():
        for regime in ("all", "one"):
            samples = math.ceil(arguments.tokens / flips_a_sample[name])
            rows += rows_of(name, regime, flip_test(cases(samples), regime))
            with arguments.out.open("w", newline="") as f:
                writer = csv.DictWriter(f, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
