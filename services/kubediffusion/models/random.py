# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request's random numbers: a CPU generator, handed from stage to stage as a tensor."""

from __future__ import annotations

import torch

from kubediffusion.errors import InvalidInput


def generator_of(value: object) -> torch.Generator:
    """From a seed, or from the state that an earlier stage left."""
    generator = torch.Generator("cpu")
    if isinstance(value, torch.Tensor):
        try:
            generator.set_state(value.to("cpu", torch.uint8))
        except (RuntimeError, TypeError) as error:
            raise InvalidInput(f"no state of a generator: {error}", field="generator") from error
        return generator
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput("it must be a whole number", field="seed")
    if not -(2**63) <= value < 2**64:
        raise InvalidInput("it must be of 64 bits at most", field="seed")
    return generator.manual_seed(value)


def state_of(generator: torch.Generator) -> torch.Tensor:
    """uint8 (5056,) of the CPU's Mersenne Twister."""
    return generator.get_state()
