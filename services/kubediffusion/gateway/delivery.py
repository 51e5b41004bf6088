# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From a decode stage's output to the picture a client gets: fetch, hooks, PNG."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np

from kubediffusion.errors import Internal, TensorLost
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.gateway.hooks import Hooks, ImageContext
from kubediffusion.gateway.images import encode_png, to_image
from kubediffusion.tensors import Fetcher
from kubediffusion.v1alpha1 import gateway_pb2, tensor_pb2

T = TypeVar("T")
# Encoding so few bytes takes less time than handing them to a thread.
SMALL_BYTES = 16 * 1024


class Delivery:
    def __init__(self, fetcher: Fetcher, hooks: Hooks, workers: Executor) -> None:
        self._fetcher = fetcher
        self._hooks = hooks
        self._workers = workers

    def must_wait(self, image: tensor_pb2.Value) -> bool:
        """Whether the picture takes a fetch, a hook, or time."""
        ref = image.tensor
        return (
            not ref.HasField("inline") or ref.nbytes > SMALL_BYTES or self._hooks.processes_images
        )

    def picture_now(self, image: tensor_pb2.Value) -> gateway_pb2.Image:
        return self._encode(np.frombuffer(image.tensor.inline, np.uint8), image.tensor, None)

    async def picture(
        self, image: tensor_pb2.Value, context: ImageContext, run: ImageRun
    ) -> gateway_pb2.Image | None:
        """None where the bytes are gone: the run has been told and makes them again."""
        try:
            pixels = await self._fetcher.fetch(image.tensor)
        except TensorLost as error:
            run.result_lost(error.message)
            return None
        return await self.in_worker(lambda: self._encode(pixels, image.tensor, context))

    async def preview(
        self, image: tensor_pb2.TensorRef, context: ImageContext
    ) -> gateway_pb2.Image | None:
        """None where it could not be had; nothing depends on a preview."""
        try:
            pixels = await self._fetcher.fetch(image)
        except TensorLost:
            return None
        return await self.in_worker(lambda: self._encode(pixels, image, context))

    async def in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def _encode(
        self, pixels: np.ndarray, ref: tensor_pb2.TensorRef, context: ImageContext | None
    ) -> gateway_pb2.Image:
        if len(ref.shape) != 3 or ref.shape[2] != 3 or ref.dtype != tensor_pb2.DTYPE_U8:
            raise Internal(f"a node gave {list(ref.shape)} {ref.dtype} for an image")
        picture = to_image(pixels, ref.shape)
        if context is not None:
            picture = self._hooks.process_image(picture, context)
        width, height = picture.size
        return gateway_pb2.Image(png=encode_png(picture), width=width, height=height)

    async def close(self) -> None:
        await self._fetcher.close()
