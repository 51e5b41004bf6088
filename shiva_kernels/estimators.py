# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How a hard top-k is given a gradient: six arms behind one option.

The forward is always the hard selection: no score ever touches a feature. The arms differ in which
inner product becomes dL/dpi, the gradient of a token's soft selection pi, and in how pi follows
from the scores s and from k. With F = y - x, what the block adds to a token, they are

    arm               kept              rejected                  pi
    RESIDUAL          +<dL/dx, x>       -<dL/dx, x>               soft rank
    PROSE             -<dL/dx, x>       -<dL/dx, x>               soft rank
    THRESHOLD         +<dL/dx, x>       -<dL/dx, x>               sigmoid threshold
    STRAIGHT_THROUGH  +<dL/dx, x>       0                         identity in s
    MOD               +<dL/dy, F>       0                         soft rank
    BENEFIT           +<dL/dy, F>       +<dL/dy, F_teacher>       soft rank

RESIDUAL is Eq. 7 of Shiva-DiT (arXiv 2602.05605), taken as the derivative that it defines; PROSE is
what the paper's text (A.2) reads out of it, where a kept token with a large positive product is
promoted. MOD is the gate of Mixture-of-Depths
(arXiv 2404.02258) as DiffCR uses it, here without its scaling of the forward. BENEFIT is ours: to
first order in F it is what the loss gains when the token changes sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from shiva_kernels.ops import soft_rank


class Estimator(StrEnum):
    """The arms; see the table above."""

    RESIDUAL = "residual"
    PROSE = "prose"
    MOD = "mod"
    STRAIGHT_THROUGH = "straight-through"
    THRESHOLD = "threshold"
    BENEFIT = "benefit"

    @property
    def gates_input(self) -> bool:
        """Whether dL/dpi is taken before the gather (else after the scatter)."""
        return self not in (Estimator.MOD, Estimator.BENEFIT)


@dataclass(frozen=True)
class Surrogate:
    """An arm and its temperatures; they are annealed, so a value lasts for one step.

    `tau_rank` is in units of the (standardised) scores, `tau_sel` a share of N.
    """

    estimator: Estimator = Estimator.RESIDUAL
    tau_rank: float = 0.2
    tau_sel: float = 0.1


def soft_selection(scores: Tensor, k: Tensor, surrogate: Surrogate) -> Tensor:
    """How far each token is selected, pi in [0, 1]: what carries gradients to `scores` and `k`.

    `scores` is float32 [B, N], the same (noisy) scores that top-k ranks; `k` a float tensor [] or
    [B], the unfloored N * r. Returns pi [B, N]:

    - soft rank: sigmoid((k - soft_rank(s)) / (tau_sel N)), Eq. 5 and 30. It sums to about k.
    - THRESHOLD: sigmoid((s + b) / tau_rank) with b such that it sums to k exactly.
    - STRAIGHT_THROUGH: the hard 0 or 1, with derivative 1 in s, and none in k: `k` then gets a zero
      gradient, which is why this arm cannot learn a ratio.
    """
    k = k.reshape(-1, 1).to(scores.dtype)
    match surrogate.estimator:
        case Estimator.THRESHOLD:
            return _threshold_selection(scores, k, surrogate.tau_rank)
        case Estimator.STRAIGHT_THROUGH:
            rank = scores.detach().argsort(dim=1, descending=True, stable=True)
            rank = rank.argsort(dim=1)
            hard = (rank < k.detach().floor()).to(scores.dtype)
            return hard + (scores - scores.detach()) + 0 * k
        case _:
            ranks = soft_rank(scores, surrogate.tau_rank)
            return torch.sigmoid((k - ranks) / (surrogate.tau_sel * scores.shape[1]))


def _threshold_selection(scores: Tensor, k: Tensor, tau: float) -> Tensor:
    """sigmoid((s + b) / tau), of sum k; derivatives by the implicit function theorem."""
    with torch.no_grad():
        span = tau * 20
        low, high = -scores.amax(1, keepdim=True) - span, -scores.amin(1, keepdim=True) + span
        for _ in range(40):
            middle = (low + high) / 2
            above = torch.sigmoid((scores + middle) / tau).sum(1, keepdim=True) > k
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        b = (low + high) / 2
        p = torch.sigmoid((scores + b) / tau)
        slope = (p * (1 - p)).sum(1, keepdim=True) / tau
    # One Newton step from the solution: it moves b by rounding only, and carries the derivatives.
    excess = torch.sigmoid((scores + b) / tau).sum(1, keepdim=True) - k
    return torch.sigmoid((scores + (b - excess / slope.clamp_min(1e-12))) / tau)


def gate_input(x: Tensor, pi: Tensor, kept: Tensor, estimator: Estimator) -> Tensor:
    """`x` as it is; backward adds dL/dpi of the arms that look at a block's input.

    Called before the gather: `x` [B, N, D], `pi` [B, N], `kept` bool [B, N]. For a kept token the
    gradient of `x` comes through the block and its skip, for a rejected one through the identity.
    """
    if not estimator.gates_input:
        return x
    sign = kept.to(pi.dtype)
    if estimator is Estimator.PROSE:
        sign = -torch.ones_like(sign)
    elif estimator is not Estimator.STRAIGHT_THROUGH:
        sign = 2 * sign - 1
    return _Credit.apply(x, pi, sign, None, None)


def gate_output(
    x: Tensor,
    y: Tensor,
    pi: Tensor,
    kept: Tensor,
    estimator: Estimator,
    teacher_delta: Tensor | None = None,
) -> Tensor:
    """`y` as it is; backward adds dL/dpi of the arms that look at a block's output.

    Called after the scatter: `x` and `y` [B, N, D] are the block's input and output (the rows of
    rejected tokens equal), `pi` [B, N], `kept` bool [B, N]. BENEFIT needs `teacher_delta`
    [B, N, D]: what the dense teacher's block adds to each token; rows of kept tokens are not read.
    """
    if estimator.gates_input:
        return y
    y = _Credit.apply(y, pi, kept.to(pi.dtype), None, x)
    if estimator is Estimator.BENEFIT:
        if teacher_delta is None:
            raise ValueError(
                "the benefit estimator needs teacher_delta [B, N, D], what the dense teacher's "
                "block adds to each token: record it in the teacher's forward, or take another arm"
            )
        y = _Credit.apply(y, pi, (~kept).to(pi.dtype), teacher_delta, None)
    return y


class _Credit(torch.autograd.Function):
    """value -> value; backward: dL/dpi = weight <dL/dvalue, toward - origin> for each token.

    The same as multiplying by 1 + pi - sg(pi), without the product over [B, N, D] in the forward
    and without rounding in the gradient of `value`. `toward` is `value` itself where None (the
    compiler refuses one tensor under two names), `origin` zero.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        value: Tensor,
        pi: Tensor,
        weight: Tensor,
        toward: Tensor | None,
        origin: Tensor | None,
    ) -> Tensor:
        toward = value if toward is None else toward
        ctx.save_for_backward(weight, toward, origin)  # pyright: ignore[reportArgumentType]
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, toward, origin = ctx.saved_tensors
        direction = toward if origin is None else toward - origin
        product = torch.einsum("bnd,bnd->bn", grad, direction.to(grad.dtype))
        return grad, product.to(weight.dtype) * weight, None, None, None
