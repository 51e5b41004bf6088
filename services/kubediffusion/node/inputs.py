# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a task needs before it can run: its tensors and its LoRAs' files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

from kubediffusion.errors import InvalidInput, TensorLost
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

    def check(self, assign: node_pb2.Assign, spec: node_pb2.ModelSpec) -> None:
        """Raises InvalidInput for what can be seen to be wrong without fetching anything."""
        for ref in _references(assign):
            ports.check(ref)
        if not assign.loras:
            return
        declared = {lora.name for lora in spec.loras}
        for use in assign.loras:
            if use.name not in declared:
                raise InvalidInput(
                    f"LoRA {use.name!r} is not declared for this model; declared are "
                    f"{', '.join(sorted(declared)) or 'none'}",
                    field=f"loras.{use.name}",
                )

    def at_hand(self, task: Task) -> bool:
        """Whether nothing has to be waited for; then the task is complete."""
        if _to_pull(task.assign):
            return False
        if task.assign.loras:
            found = [self._loras.get(_source(use)) for use in self._declared(task)]
            if any(path is None for path in found):
                return False
            task.loras = self._resolved(task)
        return True

    async def gather(self, task: Task) -> None:
        """Raises TensorLost with all that are lost, InvalidInput, or SourceUnavailable."""
        begin = perf_counter()
        refs = _to_pull(task.assign)
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
        task.fetched = {
            i: array for i, array in zip(refs, arrays, strict=True) if isinstance(array, np.ndarray)
        }
        for use in self._declared(task):
            if _source(use) not in self._loras:
                self._loras[_source(use)] = await in_thread(self._resolve_lora, use)
        task.loras = self._resolved(task)
        task.fetch_seconds = perf_counter() - begin

    def trim(self) -> None:
        self._fetcher.trim()

    async def close(self) -> None:
        await self._fetcher.close()

    def _declared(self, task: Task) -> list[node_pb2.LoraUse]:
        """As the model's spec declares them: a request chooses among them, and no other files.

        Workflows that share the model may have given one name to different LoRAs; then the one
        that the request's own workflow meant.
        """
        declared = {lora.name: lora for lora in task.resident.spec.loras}
        exact = {(lora.name, _source(lora)): lora for lora in task.resident.spec.loras}
        chosen = [
            exact.get((use.name, _source(use)), declared.get(use.name)) for use in task.assign.loras
        ]
        if None in chosen:
            raise InvalidInput("a LoRA of this request is not declared any more", field="loras")
        return [lora for lora in chosen if lora is not None]

    def _resolved(self, task: Task) -> list[Lora]:
        return [
            Lora(use.name, self._loras[_source(declared)], use.scale, declared.weight_name)
            for use, declared in zip(task.assign.loras, self._declared(task), strict=True)
        ]


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
