# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The Python client: `Client` for plain code, `AsyncClient` for asyncio.

    with Client("127.0.0.1:8431") as client:
        client.image("sd3", prompt="a red circle above a blue square", seed=7).save("out.png")

        for event in client.generate("sd3", prompt="...", n=4, previews=2):
            match event:
                case Stepped(index=index, step=step, total_steps=total): ...
                case Image() as image: image.pil().show()

Leaving `generate` early cancels the request. Failures are the classes of `kubediffusion.errors`.
"""

from kubediffusion.client.aio import AsyncClient
from kubediffusion.client.events import (
    Event,
    Finished,
    Image,
    Preview,
    Queued,
    Resumed,
    StageTime,
    Started,
    Stepped,
)
from kubediffusion.client.records import Input, Job, JobState, Model, Node, Status, Workflow
from kubediffusion.client.sync import Client

__all__ = [
    "AsyncClient",
    "Client",
    "Event",
    "Finished",
    "Image",
    "Input",
    "Job",
    "JobState",
    "Model",
    "Node",
    "Preview",
    "Queued",
    "Resumed",
    "StageTime",
    "Started",
    "Status",
    "Stepped",
    "Workflow",
]
