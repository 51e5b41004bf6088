# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a task needs before it can run: its tensors and its LoRAs' files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from kubediffusion.errors import TensorLost
from kubediffusion.models.base import Lora
from kubediffusion.node import ports
from kubediffusion.node.tasks import Task
from kubediffusion.node.threads import in_thread
from kubediffusion.tensors import Fetcher, references
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

# Where a declared LoRA lies.
ResolveLora = Callable[[node_pb2.LoraUse], Path]
_Source = tuple[str, str, str, str]


class Inputs:
    """Fetches by themselves, while the device works for others."""

    def __init__(self, fetcher: Fetcher, resolve_lora: ResolveLora) -> None:
        self._fetcher = fetcher
        self._resolve_lora = resolve_lora
        # As many as the planned models declare.
        self._loras: dict[_Source, Path] = {}

    def check(self, assign: node_pb2.Assign) -> None:
        """Raises InvalidInput for what can be seen to be wrong without fetching anything."""
        for ref in _references(assign):
            ports.check(ref)

    def at_hand(self, task: Task) -> bool:
        """Whether nothing has to be waited for; then the task is complete."""
        if _to_pull(task.assign):
            return False
        if task.assign.loras:
            found = [self._loras.get(_source(lora)) for lora in task.loras_declared]
            if any(path is None for path in found):
                return False
            task.loras = self._resolved(task.assign.loras, task.loras_declared)
        return True

    async def gather(self, task: Task) -> None:
        """Raises TensorLost with all that are lost, InvalidInput, or SourceUnavailable."""
        begin = perf_counter()
        task.fetched = await self.pull(_references(task.assign))
        task.loras = await self.loras(task.assign.loras, task.loras_declared)
        task.fetch_seconds = perf_counter() - begin

    async def pull(self, references: Iterable[tensor_pb2.TensorRef]) -> ports.Arrays:
        """What does not come inline, by id. Raises TensorLost with all that are lost."""
        refs = {ref.id: ref for ref in references if not ref.HasField("inline")}
        arrays = await asyncio.gather(
            *(self._fetcher.fetch_array(ref) for ref in refs.values()), return_exceptions=True
        )
        errors = [array for array in arrays if isinstance(array, BaseException)]
        lost = [error for error in errors if isinstance(error, TensorLost)]
        if lost:
            ids = tuple(i for error in lost for i in error.tensor_ids)
            raise TensorLost(str(lost[0]), tensor_ids=ids)
        if errors:
            raise errors[0]
        return {
            i: array for i, array in zip(refs, arrays, strict=True) if isinstance(array, np.ndarray)
        }

    async def loras(
        self, uses: Sequence[node_pb2.LoraUse], declared: Sequence[node_pb2.LoraUse]
    ) -> list[Lora]:
        """With their files. Raises InvalidInput, or SourceUnavailable."""
        for lora in declared:
            if _source(lora) not in self._loras:
                self._loras[_source(lora)] = await in_thread(self._resolve_lora, lora)
        return self._resolved(uses, declared)

    def trim(self) -> None:
        self._fetcher.trim()

    async def close(self) -> None:
        await self._fetcher.close()

    def _resolved(
        self, uses: Sequence[node_pb2.LoraUse], declared: Sequence[node_pb2.LoraUse]
    ) -> list[Lora]:
        return [
            Lora(use.name, self._loras[_source(found)], use.scale, found.weight_name)
            for use, found in zip(uses, declared, strict=True)
        ]


class UndeclaredError(Exception):
    """A LoRA that the plan which this node knows does not declare."""


def declared(
    assign: node_pb2.Assign | node_pb2.AssistOpen, spec: node_pb2.ModelSpec
) -> tuple[node_pb2.LoraUse, ...]:
    """The task's LoRAs as the model's spec declares them: a request chooses among these, and no
    other files.

    Workflows that share the model may have given one name to different LoRAs, and so may two
    revisions of one: then it is the one that the request's own revision meant. Raises
    UndeclaredError.
    """
    by_name = {lora.name: lora for lora in spec.loras}
    exact = {(lora.name, _source(lora)): lora for lora in spec.loras}
    chosen: list[node_pb2.LoraUse] = []
    for use in assign.loras:
        # Of one that is known by its name alone any will do; of another its very files.
        found = exact.get((use.name, _source(use))) if use.uri else by_name.get(use.name)
        if found is None:
            names = ", ".join(sorted(by_name)) or "none"
            raise UndeclaredError(
                f"the plan of this node declares no LoRA {use.name!r} of that source for model "
                f"{spec.identity}; declared are {names}"
            )
        chosen.append(found)
    return tuple(chosen)


def _references(assign: node_pb2.Assign) -> Iterator[tensor_pb2.TensorRef]:
    for value in assign.inputs.values():
        yield from references(value)
    if assign.lease.HasField("resume"):
        yield from assign.lease.resume.tensors.values()


def _to_pull(assign: node_pb2.Assign) -> dict[str, tensor_pb2.TensorRef]:
    """What does not come inline, by id."""
    return {ref.id: ref for ref in _references(assign) if not ref.HasField("inline")}


def _source(lora: node_pb2.LoraUse) -> _Source:
    return (lora.uri, lora.revision, lora.subfolder, lora.weight_name)
