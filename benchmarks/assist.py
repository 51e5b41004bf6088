# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a branch of guidance on a second node costs or gains, on this machine.

    python -m benchmarks.assist [--model tiny-sd3|standin] [--rounds 10] [--width 128] [--json FILE]

Two node processes of one thread each, both with the transformer; a gateway asks for the same
picture with and without the second one's help, in turn. Seconds of the denoising as the gateway
sees it, from handing the lease out to its end. tiny-sd3's two processes compete for this machine's
cores: what a second accelerator would gain is not measured by it. Stand-ins sleep 20 ms a branch,
which shows what asking and answering costs beside the computing, whatever else runs here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path

import yaml
from google.protobuf import json_format

from benchmarks.common import machine
from benchmarks.exact import tiny
from benchmarks.peers.standin_service import NoFiles, three_stages
from benchmarks.reference import Case, Setup, inputs, workflow
from kubediffusion import api, sources
from kubediffusion import workflow as language
from kubediffusion.gateway import helpers
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.local.specs import model_spec
from kubediffusion.scheduling.fleet import serving
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2

STEPS = 20
STEP_SECONDS = 0.04
NAMES = ("one", "two")


class Choice:
    """In the place of the gateway's own: help for every lease, or none."""

    def __init__(self) -> None:
        self.divide = False

    def __call__(
        self, fleet: Fleet, planned: PlannedTask, address: str, failed_on: frozenset[str]
    ) -> helpers.Helpers:
        if not self.divide or planned.stage != "denoise":
            return helpers.NONE
        other = next(node for name, node in fleet.connections.items() if name != address)
        return helpers.Helpers(other)


def asked(model: str, width: int) -> tuple[language.ResolvedWorkflow, dict[str, object]]:
    """A workflow, and the inputs of a request to it."""
    if model == "standin":
        resolved = three_stages({"step_seconds": str(STEP_SECONDS)})
        return resolved, {"prompt": "a", "steps": STEPS, "seed": 1}
    setup = tiny("float32")
    plain = Setup(setup.path, {}, {}, setup.dtype)
    definition = api.load_workflow(yaml.safe_dump(yaml.safe_load(workflow(plain, "assist"))))
    index = sources.read_index(definition.spec.pipeline.source.uri)
    case = Case("assist", negative_prompt="blue", steps=STEPS, width=width, height=width)
    return language.resolve(definition, index), inputs(case)


def serve(folder: Path, name: str) -> None:
    """In the node's process."""
    from kubediffusion import models
    from kubediffusion.node.config import NodeConfig
    from kubediffusion.node.library import Library
    from kubediffusion.node.process import default_library, run_process

    residency = folder / f"{name}.json"
    config = NodeConfig(
        name,
        f"unix:{folder}/{name}.sock",
        shm_dir=folder / "shm",
        residency=residency,
        threads=1,
        exit_with_parent=True,
        log_level="ERROR",
    )
    standin = '"family": "standin"' in residency.read_text()
    nothing = Library(models.family, lambda uri, *_, **__: NoFiles(folder / "none"))
    run_process(config, nothing if standin else default_library())


async def denoised(gateway: Gateway, name: str, values: dict[str, object]) -> tuple[float, int]:
    """Seconds of the denoising, and how many of its steps were helped."""
    request = gateway_pb2.GenerateRequest(
        workflow=name,
        inputs={port: encode_value(value) for port, value in values.items()},
        numerics=node_pb2.NUMERICS_FAST,
    )
    async for event in gateway.generate(request):
        if event.WhichOneof("kind") == "finished":
            (time,) = [each for each in event.finished.stages if each.stage == "denoise"]
            return time.total_seconds, time.timing.steps_helped
    raise RuntimeError("the request did not finish")


async def turns(
    gateway: Gateway, resolved: language.ResolvedWorkflow, values: dict[str, object], rounds: int
) -> tuple[dict[bool, list[float]], list[int]]:
    """Seconds without and with help, and the steps that were helped: A B, B A, A B, …"""
    choice = Choice()
    helpers.choose = choice
    times: dict[bool, list[float]] = {False: [], True: []}
    helped: list[int] = []
    for turn in range(-2, 2 * rounds):
        choice.divide = (turn + turn // 2) % 2 == 1
        seconds, steps = await denoised(gateway, resolved.name, values)
        if turn >= 0:
            times[choice.divide].append(seconds)
            helped += [steps] if choice.divide else []
    return times, helped


async def measure(model: str, rounds: int, width: int) -> dict[str, object]:
    resolved, values = asked(model, width)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        hosted = {"one": [*resolved.models.values()], "two": [resolved.models["transformer"]]}
        nodes = []
        for name in NAMES:
            specs = [model_spec(ref) for ref in hosted[name]]
            plan = node_pb2.SetResidencyRequest(generation=1, models=specs)
            (Path(folder) / f"{name}.json").write_text(json_format.MessageToJson(plan))
            nodes.append(context.Process(target=serve, args=(Path(folder), name), daemon=True))
            nodes[-1].start()
        gateway = Gateway(GatewayConfig(shm_dir=Path(folder) / "shm"))
        await gateway.start()
        try:
            gateway.set_workflows({resolved.name: resolved})
            gateway.set_nodes([f"unix:{folder}/{name}.sock" for name in NAMES])
            identity = resolved.models["transformer"].identity
            while len(serving(gateway.fleet.states(), identity)) < len(NAMES):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            times, helped = await turns(gateway, resolved, values, rounds)
        finally:
            await gateway.stop()
            for process in nodes:
                process.terminate()
                process.join(30)
    alone, divided = (statistics.median(times[each]) for each in (False, True))
    return {
        "model": model,
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
        "width": width if model == "tiny-sd3" else None,
        "steps": STEPS,
        "rounds": rounds,
        "steps_helped": statistics.median(helped),
        "alone_seconds": round(alone, 4),
        "divided_seconds": round(divided, 4),
        "ratio": round(divided / alone, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("tiny-sd3", "standin"), default="tiny-sd3")
    parser.add_argument("--rounds", type=int, default=10, help="measured pairs")
    parser.add_argument("--width", type=int, default=128, help="pixels of a side, of tiny-sd3")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    figures = json.dumps(asyncio.run(measure(args.model, args.rounds, args.width)), indent=2)
    print(figures)
    if args.json is not None:
        args.json.write_text(figures + "\n")


if __name__ == "__main__":
    main()
