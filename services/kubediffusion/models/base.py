# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a family must offer so that a node can host its models.

A *component* is one loadable network of a pipeline (``text_encoder``, ``transformer``, ``vae``,
``controlnet``). Loading gives a `Model`; its one-shot uses (``encode``, ``decode``,
``encode_image``) go through `Model.run`, and a denoiser additionally is a `Denoiser`, whose state
lives in one `Denoising` per lease and never on the module, so that leases can interleave.

All calls come from the node's one device thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

# What flows through a port inside a node. An image leaves as uint8 (height, width, 3).
PortValue: TypeAlias = (
    "torch.Tensor | np.ndarray | str | int | float | bool | bytes | list[PortValue]"
)


@dataclass(frozen=True)
class Lora:
    """A declared LoRA as one request uses it; `path` is its local file or folder."""

    name: str
    path: Path
    scale: float
    weight_name: str = ""


@dataclass(frozen=True)
class LoadSpec:
    """Where a component's files lie and how to load them."""

    identity: str
    family: str
    component: str
    path: Path  # the component's own folder: config.json and *.safetensors
    pipeline_path: Path  # the pipeline's folder: tokenizers and the scheduler's config lie beside
    dtype: str = "float32"  # float32, bfloat16, float16
    variant: str = ""
    class_name: str = ""
    device: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    # The folder of the pruning artifact that is merged into the weights.
    pruning_path: Path | None = None
    # Where compiled code is kept from one start to the next.
    compile_cache: Path | None = None


@dataclass(frozen=True)
class StepCache:
    """Which steps of a lease may reuse what the blocks added at an earlier one.

    `ratios`, `max_skip_steps` and `retention` are diffusers' `MagCacheConfig`'s.
    """

    method: str  # magcache
    threshold: float
    ratios: tuple[float, ...] = ()
    max_skip_steps: int = 3
    retention: float = 0.2


@dataclass(frozen=True)
class Measures:
    """What a model has counted of itself since it was loaded."""

    # Image tokens that came to blocks which could leave some out, and those that these computed.
    tokens_seen: int = 0
    tokens_kept: int = 0
    # Graphs of torch.compile, and what making them took.
    graphs: int = 0
    compile_seconds: float = 0.0
    # Steps of leases with a step cache that computed no block.
    steps_reused: int = 0


@runtime_checkable
class Measured(Protocol):
    """A `Model` that counts."""

    @property
    def measures(self) -> Measures:
        """Read by the event loop, between any two lines of what the device's thread does."""
        ...


@dataclass(frozen=True)
class CheckpointState:
    """All that another node with an equal fingerprint needs to go on exactly."""

    step: int
    total_steps: int
    tensors: Mapping[str, torch.Tensor]


class Denoising(Protocol):
    """One request's denoising, between two steps."""

    @property
    def step(self) -> int:
        """Steps done so far."""
        ...

    @property
    def total_steps(self) -> int: ...

    def checkpoint(self) -> CheckpointState: ...

    def preview(self) -> np.ndarray:
        """A cheap picture of the present latents: uint8 (height, width, 3)."""
        ...

    def finish(self) -> Mapping[str, PortValue]:
        """The outputs, when `step == total_steps`; beside them `warnings`, as of `Model.run`."""
        ...


class Model(Protocol):
    spec: LoadSpec

    @property
    def stages(self) -> tuple[str, ...]: ...

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        """What a gateway must know to check a request, such as ``patch_size``."""
        ...

    @property
    def nbytes(self) -> int: ...

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        """A one-shot stage. Raises InvalidInput naming the port at fault.

        Beside its ports the result may have `warnings`: texts for whoever asked.
        """
        ...

    def unload(self) -> None: ...


@runtime_checkable
class Denoiser(Protocol):
    """A `Model` that also denoises."""

    def start(
        self,
        inputs: Mapping[str, PortValue],
        loras: Sequence[Lora] = (),
        resume: CheckpointState | None = None,
        controlnets: Sequence[tuple[str, Model | None]] = (),
        budget: float | None = None,
        step_cache: StepCache | None = None,
    ) -> Denoising:
        """`controlnets` by name, in the workflow's order; ports `control.<name>.latents`.

        One whose model is None is elsewhere: `Divisible` steps bring what it computes.
        `budget` is the mean share of tokens to keep, None for all of them; `step_cache` lets steps
        be left out. Raises InvalidInput, field ``budget`` or ``step_cache``, where the model cannot
        keep to it.
        """
        ...

    def batch_key(self, denoising: Denoising) -> object:
        """Denoisings with equal keys may share their next step in ``numerics: fast``."""
        ...

    def advance(self, batch: Sequence[Denoising]) -> None:
        """One step of each. With one element the bits are those of the family's pipeline."""
        ...


class Part(Enum):
    """What of a denoiser's step another node may compute. The value is the stage's name."""

    # The negative prompt's half of classifier-free guidance.
    BRANCH = "branch"
    # One ControlNet's residuals.
    CONTROL = "control"


@dataclass(frozen=True)
class PartStep:
    """What a part needs of one step beside its constants. `latents` (1, C, h, w)."""

    step: int  # steps done so far
    timestep: float
    latents: torch.Tensor
    # Of a ControlNet at this step: 0 outside of its start and end.
    scale: float = 1.0


class Helping(Protocol):
    """One part of one lease's steps, on the node that computes it for another."""

    def compute(self, step: PartStep) -> Sequence[torch.Tensor]:
        """In the order in which the consumer uses them."""
        ...


@runtime_checkable
class Helper(Protocol):
    """A `Model` that can compute a part of other nodes' leases."""

    def help(
        self, part: Part, constants: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Helping:
        """`constants` are what `Divisible.constants` gave. Raises InvalidInput."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A `Denoiser` whose steps can be computed in parts, some of them elsewhere.

    A step of one lease is then `own` (only where the branch is divided), any other work of the
    device in between, and `assemble` once the other parts have come. Until `assemble` the denoising
    is where it was: it can be checkpointed, given up, or stepped by `Denoiser.advance` instead.
    """

    def constants(self, denoising: Denoising, part: Part, name: str) -> Mapping[str, PortValue]:
        """Of all steps, for a helper; `name` is a ControlNet's.

        Raises InvalidInput, field `helpers`, where the part cannot be computed elsewhere.
        """
        ...

    def part_step(self, denoising: Denoising, part: Part, name: str) -> PartStep:
        """The next step, for a helper."""
        ...

    def own(self, denoising: Denoising) -> None:
        """The prompt's branch of the next step, kept until `assemble` or `advance`."""
        ...

    def assemble(
        self,
        denoising: Denoising,
        parts: Mapping[tuple[Part, str], Sequence[torch.Tensor]],
    ) -> None:
        """The next step, from `parts` by (part, name); what is not among them is computed here.

        In the order of arithmetic of `advance`: with ControlNets elsewhere, to the same bits.
        """
        ...


@dataclass(frozen=True)
class Family:
    """One architecture family: its name in workflows and how its components load."""

    name: str
    components: tuple[str, ...]
    load: Callable[[LoadSpec], Model]
