# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Muon with its orthogonalisation shared out among the data-parallel processes."""

import torch
import torch.distributed as dist

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration on a stack of matrices, (n, rows, columns)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()


class SharedMuon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to the size of an AdamW step.

    The matrices are many and small, so that the iteration costs as much as a third of the backward
    pass: matrices of one shape go through it as a stack, and each process takes every n-th one.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(matrices, {"lr": rate, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; gradients must be equal on all processes."""
        del closure
        for group in self.param_groups:
            directions = [self._direction(matrix) for matrix in group["params"]]
            updates = self._orthogonal(directions)
            for matrix, update in zip(group["params"], updates, strict=True):
                scale = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["decay"])
                matrix.add_(update, alpha=-group["lr"] * scale)

    def _direction(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        gradient = matrix.grad if matrix.grad is not None else torch.zeros_like(matrix)
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)

    @staticmethod
    def _orthogonal(directions: list[torch.Tensor]) -> list[torch.Tensor]:
        shared = dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        shapes = sorted({tuple(d.shape) for d in directions})
        order = [i for shape in shapes for i, d in enumerate(directions) if d.shape == shape]
        results = [torch.zeros_like(direction) for direction in directions]
        mine = order[rank::world]
        for shape in shapes:
            same = [i for i in mine if directions[i].shape == shape]
            if same:
                solved = orthogonalize(torch.stack([directions[i] for i in same]))
                for i, matrix in zip(same, solved, strict=True):
                    results[i] = matrix
        if not shared:
            return results
        flat = torch.cat([result.flatten() for result in results])
        dist.all_reduce(flat)
        parts = flat.split([result.numel() for result in results])
        return [part.view_as(result) for part, result in zip(parts, results, strict=True)]
