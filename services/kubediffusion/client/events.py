# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What happens to a request, in the order it happens."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kubediffusion.v1alpha1 import gateway_pb2

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True)
class Event:
    """`index` says which of the request's n images it is about."""

    request_id: str
    index: int


@dataclass(frozen=True)
class Queued(Event):
    """The request waits; `cold`: for a model that has no replica yet."""

    cold: bool
    ahead: int


@dataclass(frozen=True)
class Started(Event):
    stage: str
    node: str


@dataclass(frozen=True)
class Stepped(Event):
    """`step` of `total_steps` denoising steps are done."""

    step: int
    total_steps: int


@dataclass(frozen=True)
class Resumed(Event):
    """A node was lost; the stage goes on elsewhere after `from_step` steps."""

    stage: str
    from_step: int
    reason: str


@dataclass(frozen=True)
class _Picture(Event):
    png: bytes
    width: int
    height: int
    seed: int

    def pil(self) -> PIL.Image.Image:
        """The picture for Pillow, decoded."""
        import PIL.Image

        image = PIL.Image.open(io.BytesIO(self.png))
        image.load()
        return image

    def save(self, path: str | Path) -> None:
        """Writes the PNG as the gateway sent it, byte for byte."""
        Path(path).write_bytes(self.png)


@dataclass(frozen=True)
class Preview(_Picture):
    """A rough picture after `step` steps."""

    step: int


@dataclass(frozen=True)
class Image(_Picture):
    """A finished picture; the same `seed` gives it again. `warnings` say what was done otherwise
    than one may think, such as a long prompt of which an encoder reads the beginning."""

    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageTime:
    """Where the time of one stage of one image went, in seconds."""

    index: int
    task: str
    stage: str
    node: str
    queue_seconds: float
    fetch_seconds: float
    run_seconds: float
    total_seconds: float
    steps: int
    attempts: int


@dataclass(frozen=True)
class Finished(Event):
    """All images were sent."""

    seconds: float
    stages: tuple[StageTime, ...]


def event_of(message: gateway_pb2.GenerateEvent) -> Event | None:
    """None for a kind of event that this version does not know."""
    base = (message.request_id, message.index)
    match message.WhichOneof("kind"):
        case "queued":
            return Queued(*base, message.queued.cold, message.queued.ahead)
        case "started":
            return Started(*base, message.started.stage, message.started.node)
        case "stepped":
            return Stepped(*base, message.stepped.step, message.stepped.total_steps)
        case "resumed":
            resumed = message.resumed
            return Resumed(*base, resumed.stage, resumed.from_step, resumed.reason)
        case "preview":
            p = message.preview
            return Preview(*base, p.png, p.width, p.height, p.seed, p.step)
        case "image":
            return image_of(message.image, *base)
        case "finished":
            stages = tuple(_stage_time(stage) for stage in message.finished.stages)
            return Finished(*base, message.finished.seconds, stages)
    return None


def image_of(image: gateway_pb2.Image, request_id: str, index: int) -> Image:
    return Image(
        request_id,
        index,
        image.png,
        image.width,
        image.height,
        image.seed,
        tuple(image.warnings),
    )


def _stage_time(stage: gateway_pb2.StageTime) -> StageTime:
    timing = stage.timing
    return StageTime(
        index=stage.index,
        task=stage.task,
        stage=stage.stage,
        node=stage.node,
        queue_seconds=timing.queue_seconds,
        fetch_seconds=timing.fetch_seconds,
        run_seconds=timing.run_seconds,
        total_seconds=stage.total_seconds,
        steps=timing.steps_run,
        attempts=stage.attempts,
    )
