# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Node processes as a pod starts them, with models that go wrong in every way."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from kubediffusion.errors import SourceUnavailable, UnsupportedModel
from kubediffusion.models.base import Family, LoadSpec
from kubediffusion.models.standin import STANDIN
from kubediffusion.node.config import NodeConfig
from kubediffusion.node.library import Library
from kubediffusion.node.process import run_process
from kubediffusion.v1alpha1 import node_pb2

WAIT = 120.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kubediffusion.node.process", "kubediffusion.models.standin"])


class NoFiles:
    path = Path("/nonexistent")


def load(spec: LoadSpec) -> Any:
    """A stand-in, or what its options say: ``broken`` is the message of a lasting failure, and
    ``poison`` a file whose coming breaks the device within a step."""
    if message := spec.options.get("broken"):
        raise UnsupportedModel(message, reason="WrongArchitecture")
    model = STANDIN.load(spec)
    if path := spec.options.get("poison"):
        plain = model.advance

        def advance(batch: Sequence[Any]) -> None:
            end = time.monotonic() + WAIT
            while not Path(path).exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            plain(batch)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        model.advance = advance
    return model


def serve(config: NodeConfig) -> None:
    """``test://down`` does not answer at first."""
    failures = iter([SourceUnavailable("it does not answer")])

    def open_source(uri: str, *args: object, **more: object) -> NoFiles:
        if uri == "test://down" and (failure := next(failures, None)):
            raise failure
        return NoFiles()

    run_process(config, Library(lambda name: Family(name, STANDIN.components, load), open_source))


def plan(*models: Mapping[str, Any], generation: int = 1) -> node_pb2.SetResidencyRequest:
    """`models` are fields of their ModelSpec; a transformer where they say nothing else."""
    request = node_pb2.SetResidencyRequest(generation=generation, planner="operator")
    for fields in models:
        plain = {"family": "odd", "component": "transformer", "uri": "test://up"}
        request.models.add(**{**plain, **fields})
    return request


class Pod:
    """A node process with a plan file and a termination log, as the operator makes them."""

    def __init__(self, folder: Path, request: node_pb2.SetResidencyRequest, **config: Any) -> None:
        self.log = folder / "termination-log"
        self.log.touch()
        self._announced = folder / "node.json"
        self._announced.unlink(missing_ok=True)
        (folder / "residency.json").write_text(json_format.MessageToJson(request))
        self.config = NodeConfig(
            node_id="pod-1",
            address="127.0.0.1:0",
            threads=1,
            announce_path=self._announced,
            residency=folder / "residency.json",
            exit_on_failure=True,
            termination_log=self.log,
            **config,
        )
        self.process = _context.Process(target=serve, args=(self.config,))
        self.process.start()

    def address(self) -> str:
        """Blocking: until it listens."""
        end = time.monotonic() + WAIT
        while not self._announced.exists():
            assert time.monotonic() < end
            assert self.process.is_alive(), self.log.read_text()
            time.sleep(0.02)
        return json.loads(self._announced.read_text())["address"]

    def exit_code(self) -> int | None:
        """Blocking: until it ends."""
        self.process.join(WAIT)
        return self.process.exitcode
