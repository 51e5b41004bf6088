# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the ports of stage `denoise`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import PortValue


def number(inputs: Mapping[str, PortValue], name: str, default: float | None = None) -> float:
    value = inputs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput("it must be a number", field=name)
    return value


def tensor(inputs: Mapping[str, PortValue], name: str) -> torch.Tensor:
    value = inputs.get(name)
    if not isinstance(value, torch.Tensor):
        raise InvalidInput("stage 'denoise' takes a tensor here", field=name)
    return value
