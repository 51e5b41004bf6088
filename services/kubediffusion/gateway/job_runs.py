# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One job that this gateway runs: its progress, and the checkpoints that another may go on from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from kubediffusion.errors import DeadlineExceeded, KubeDiffusionError, Overloaded
from kubediffusion.gateway.checkpoints import Checkpoints
from kubediffusion.gateway.job_store import KeptCheckpoint, TakenJob
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2

log = logging.getLogger(__name__)


class Generates(Protocol):
    def generate(
        self, request: gateway_pb2.GenerateRequest, checkpoints: Checkpoints | None = None
    ) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]: ...

    async def check(self, request: gateway_pb2.GenerateRequest) -> None: ...


class JobRun:
    """Its task, and why it was cancelled if it was."""

    def __init__(self, job: TakenJob, checkpoints: JobCheckpoints) -> None:
        self.job = job
        self.checkpoints = checkpoints
        self.progress = (0, 0)
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """It ends as cancelled."""
        self.cancelled = True
        self.abandon()

    def abandon(self) -> None:
        """It stops and writes nothing: another gateway has it, or will."""
        if self.task is not None:
            self.task.cancel()

    async def images(self, gateway: Generates, now: float) -> list[gateway_pb2.Image]:
        """Generates them, waiting while the gateway's queue is full. Raises KubeDiffusionError."""
        request = self._request(now)
        while True:
            try:
                return await self._generated(gateway, request)
            except Overloaded as error:
                if error.reason != "QueueFull":
                    raise
                await asyncio.sleep(min(error.retry_after, 5.0))

    def _request(self, now: float) -> gateway_pb2.GenerateRequest:
        request = gateway_pb2.GenerateRequest()
        request.CopyFrom(self.job.request)
        # Its seed derives from the key, so that it is the same images whoever runs it.
        request.idempotency_key = request.idempotency_key or self.job.lease.job
        if request.HasField("deadline_ms"):
            spent = int(max(0.0, now - self.job.started) * 1000)
            if spent >= request.deadline_ms:
                raise DeadlineExceeded(
                    f"not done within {request.deadline_ms} ms", field="deadline_ms"
                )
            request.deadline_ms -= spent
        return request

    async def _generated(
        self, gateway: Generates, request: gateway_pb2.GenerateRequest
    ) -> list[gateway_pb2.Image]:
        found: dict[int, gateway_pb2.Image] = {}
        events = gateway.generate(request, self.checkpoints)
        try:
            async for event in events:
                kind = event.WhichOneof("kind")
                if kind == "stepped":
                    self.progress = (event.stepped.step, event.stepped.total_steps)
                elif kind == "image":
                    found[event.index] = event.image
        finally:
            await events.aclose()
        return [found[index] for index in sorted(found)]


class JobCheckpoints:
    """The `Checkpoints` of a job, written behind its back: the last of each task, not too often."""

    def __init__(
        self,
        found: Sequence[KeptCheckpoint],
        write: Callable[[Sequence[KeptCheckpoint]], Awaitable[None]],
        every: float,
    ) -> None:
        self._kept = {(each.number, each.task): each for each in found}
        self._write = write
        self._every = every
        self._unwritten: dict[tuple[int, str], KeptCheckpoint] = {}
        self._writing: asyncio.Task[None] | None = None

    def found(self, index: int, plan: bytes) -> Mapping[str, node_pb2.Checkpoint]:
        return {
            each.task: each.checkpoint
            for each in self._kept.values()
            if each.number == index and each.plan == plan
        }

    def keep(self, index: int, plan: bytes, task: str, checkpoint: node_pb2.Checkpoint) -> None:
        each = KeptCheckpoint(index, task, plan, checkpoint)
        self._kept[index, task] = self._unwritten[index, task] = each
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_behind())

    async def _write_behind(self) -> None:
        while self._unwritten:
            await self._flush()
            await asyncio.sleep(self._every)
        self._writing = None

    async def _flush(self) -> None:
        batch, self._unwritten = self._unwritten, {}
        try:
            await self._write(list(batch.values()))
        except asyncio.CancelledError:
            self._unwritten = batch | self._unwritten
            raise
        except KubeDiffusionError as error:  # the next one may do better
            log.warning("checkpoints of a job were not kept: %s", error)

    async def close(self, *, flush: bool) -> None:
        """Writes what is not written yet, or forgets it."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
            self._writing = None
        if flush and self._unwritten:
            await self._flush()
        self._unwritten.clear()
