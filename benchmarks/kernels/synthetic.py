# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The synthetic study of Shiva-DiT (arXiv 2602.05605, A.3): is the right k found, and the tokens?

python -m benchmarks.kernels.synthetic [--seeds 5] [--out benchmarks/results/kernels_synthetic.csv]

From the paper: 100 tokens of width 16, of which 20 are signal (mean 10) and 80 noise; k starts at
50; Adam at 0.1 for the router, SGD at 2.0 for k; 100 steps with k held, then 700 with the budget's
pull of 0.1. It ends near k = 18 with about 95 % of the signal tokens kept.

The paper does not say what the loss is. Ours is the smallest one in which a block has something to
do: it takes away nine tenths of what a token carries. A rejected token stays as it came, and the
loss is the mean square of what is left, over tokens and features, so that rejecting a signal token
costs 100 times what rejecting noise does. The temperatures fall along a cosine from 0.2 and 0.1 to
0.05 and 0.02. Where they stay, the derivative in k, which they smooth, balances the pull with two
signal tokens left out: `--constant`.

The cosine is that of the estimate (Eq. 7: one executed path) to the ideal gradient (Eq. 22: both
paths), in pi and in the scores, for random features, a random linear block and a random target, at
half of the tokens kept. The paper does not say what its own (0.825 +- 0.043) is taken between.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

OUT = RESULTS / "kernels_synthetic.csv"
TOKENS, WIDTH, SIGNALS, MEAN = 100, 16, 20, 10.0
K_START, PULL, WARM_UP, STEPS = 50.0, 0.1, 100, 800
NOISE = 0.1  # of the standardised scores
LEFT = 0.1  # what the block leaves of a token
COLD = (0.05, 0.02)  # the last temperatures, of ranks and of the selection
LAST = 100  # steps that the outcome averages over

Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: means over its last steps, and k at each step."""

    k: float
    signals_kept: float  # a share of the signal tokens
    curve: list[float]


def prune(
    x: Tensor, scores: Tensor, k: Tensor, block: Block, surrogate: Surrogate
) -> tuple[Tensor, Tensor, Tensor]:
    """One pruned block with the arm's gates: its output [B, N, D], pi and kept [B, N]."""
    arm = surrogate.estimator
    pi = soft_selection(scores, k, surrogate)
    count = min(max(int(k), 1), scores.shape[1])
    index = scores.topk(count, dim=1).indices
    kept = torch.zeros_like(pi, dtype=torch.bool).scatter(1, index, True)
    gated = gate_input(x, pi, kept, arm)
    out = scatter_tokens(gated, index, block(gather_tokens(gated, index)))
    delta = (block(x) - x).detach() if arm is Estimator.BENEFIT else None
    return gate_output(gated, out, pi, kept, arm, teacher_delta=delta), pi, kept


def features(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A fresh sample [1, N, D], and which of its tokens are signal [1, N]."""
    signal = torch.rand(1, TOKENS, generator=generator).argsort(dim=1) < SIGNALS
    x = torch.randn(1, TOKENS, WIDTH, generator=generator)
    return x + MEAN * signal[..., None], signal


def annealed(estimator: Estimator, step: int, cold: tuple[float, float]) -> Surrogate:
    """The arm at the temperatures of a step."""
    hot = Surrogate(estimator)
    share = (1 + math.cos(math.pi * step / STEPS)) / 2
    taus = (
        share * t + (1 - share) * c for t, c in zip((hot.tau_rank, hot.tau_sel), cold, strict=True)
    )
    return Surrogate(estimator, *taus)


def study(estimator: Estimator, seed: int, cold: tuple[float, float] = COLD) -> Outcome:
    """Learn the router and k together; a new sample at every step."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    router = nn.Linear(WIDTH, 1)
    k = torch.tensor(K_START, requires_grad=True)
    adam, sgd = torch.optim.Adam(router.parameters(), lr=0.1), torch.optim.SGD([k], lr=2.0)
    curve, shares = [], []
    for step in range(STEPS):
        x, signal = features(generator)
        raw = router(x)[..., 0]
        scores = (raw - raw.mean(1, keepdim=True)) / (raw.std(1, keepdim=True) + 1e-6)
        scores = scores + NOISE * torch.randn(scores.shape, generator=generator)
        out, _, kept = prune(
            x, scores, k, lambda tokens: LEFT * tokens, annealed(estimator, step, cold)
        )
        loss = out.square().mean() + PULL * k
        adam.zero_grad()
        sgd.zero_grad()
        loss.backward()
        adam.step()
        if step >= WARM_UP:
            sgd.step()
            with torch.no_grad():
                k.clamp_(1, TOKENS)
        curve.append(float(k.detach()))
        shares.append(float((kept & signal).sum()) / SIGNALS)
    return Outcome(sum(curve[-LAST:]) / LAST, sum(shares[-LAST:]) / LAST, curve)


def cosines(seed: int) -> tuple[float, float]:
    """Of Eq. 7 (the path that ran) to Eq. 22 (both): as gradients in pi, and in the scores."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, target = randn(1, TOKENS, WIDTH), randn(1, TOKENS, WIDTH)
    weight = randn(WIDTH, WIDTH) / WIDTH**0.5
    scores = randn(1, TOKENS).requires_grad_()
    k = torch.tensor(TOKENS / 2)

    def block(tokens: Tensor) -> Tensor:
        return tokens + tokens @ weight

    def skip(tokens: Tensor) -> Tensor:
        return tokens

    out, pi, _ = prune(x, scores, k, block, Surrogate(Estimator.RESIDUAL))
    loss = (out - target).square().sum()
    (estimate,) = torch.autograd.grad(loss, pi, retain_graph=True)
    selected, rejected = (_along(path, x, target) for path in (block, skip))
    ideal = selected - rejected
    in_scores = [
        torch.autograd.grad(pi, scores, g, retain_graph=True)[0] for g in (estimate, ideal)
    ]
    return (
        float(torch.cosine_similarity(estimate, ideal)),
        float(torch.cosine_similarity(in_scores[0], in_scores[1])),
    )


def _along(path: Block, x: Tensor, target: Tensor) -> Tensor:
    """<dL/dx, x> of each token if all took this path."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((path(leaf) - target).square().sum(), leaf)
    return (grad * x).sum(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--constant", action="store_true", help="temperatures that stay")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    hot = Surrogate()
    cold = (hot.tau_rank, hot.tau_sel) if arguments.constant else COLD
    with arguments.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, ["what", "seed", "k", "signals_kept", "trials", "mean", "std"])
        writer.writeheader()
        for arm in Estimator:
            for seed in range(arguments.seeds):
                end = study(arm, seed, cold)
                print(
                    f"{arm:<17} seed {seed}: k {end.k:5.2f}, {end.signals_kept:.1%} kept",
                    flush=True,
                )
                figures = {"k": f"{end.k:.3f}", "signals_kept": f"{end.signals_kept:.4f}"}
                writer.writerow({"what": arm.value, "seed": seed, **figures})
        trials = torch.tensor([cosines(seed) for seed in range(arguments.trials)])
        for name, values in zip(("pi", "the scores"), trials.unbind(1), strict=True):
            spread, positive = float(values.std()), float((values > 0).double().mean())
            print(
                f"cosine in {name}, {len(values)} trials: {values.mean():.3f} +- {spread:.3f}, "
                f"{positive:.1%} positive"
            )
            figures = {"mean": f"{values.mean():.4f}", "std": f"{spread:.4f}"}
            writer.writerow({"what": f"cosine in {name}", "trials": len(values), **figures})
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
