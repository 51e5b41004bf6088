# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a branch of guidance on a second node costs or gains, with tiny-sd3 on this machine.

    python -m benchmarks.assist [--rounds 10] [--json FILE]

Two node processes of one thread each, both with the transformer; a gateway asks for the same
picture with and without the second one's help, in turn. Seconds of the denoising as the gateway
sees it, from handing the lease out to its end. The processes share this machine: what a second
accelerator would gain is not measured by this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from google.protobuf import json_format

from benchmarks.common import machine
from benchmarks.exact import tiny
from benchmarks.reference import Case, Setup, inputs, workflow
from kubediffusion import api, sources
from kubediffusion import workflow as language
from kubediffusion.gateway import helpers
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.scheduling.fleet import serving
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2

STEPS = 20
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


def spec_of(ref: language.ModelRef) -> node_pb2.ModelSpec:
    return node_pb2.ModelSpec(
        identity=ref.identity,
        family=ref.family,
        component=ref.component,
        uri=ref.uri,
        subfolder=ref.subfolder,
        dtype=ref.dtype,
        class_name=ref.class_name,
        options=ref.options,
    )


def start(folder: Path, name: str, models: Sequence[language.ModelRef]) -> subprocess.Popen[bytes]:
    plan = node_pb2.SetResidencyRequest(generation=1, models=[spec_of(ref) for ref in models])
    residency = folder / f"{name}.json"
    residency.write_text(json_format.MessageToJson(plan))
    flags = {
        "node-id": name,
        "address": f"unix:{folder}/{name}.sock",
        "shm-dir": folder / "shm",
        "residency": residency,
        "threads": 1,
        "exit-with-parent": "true",
        "log-level": "ERROR",
    }
    arguments = [f"--{key}={value}" for key, value in flags.items()]
    return subprocess.Popen([sys.executable, "-m", "kubediffusion.node", *arguments])


async def denoised(gateway: Gateway, case: Case) -> tuple[float, int]:
    """Seconds of the denoising, and how many of its steps were helped."""
    request = gateway_pb2.GenerateRequest(
        workflow="assist",
        inputs={name: encode_value(value) for name, value in inputs(case).items()},
        numerics=node_pb2.NUMERICS_FAST,
    )
    async for event in gateway.generate(request):
        if event.WhichOneof("kind") == "finished":
            (time,) = [each for each in event.finished.stages if each.stage == "denoise"]
            return time.total_seconds, time.timing.steps_helped
    raise RuntimeError("the request did not finish")


async def measure(rounds: int, width: int) -> dict[str, object]:
    setup = tiny("float32")
    plain = Setup(setup.path, {}, {}, setup.dtype)
    definition = api.load_workflow(yaml.safe_dump(yaml.safe_load(workflow(plain, "assist"))))
    source = definition.spec.pipeline.source
    resolved = language.resolve(definition, sources.read_index(source.uri))
    case = Case("assist", negative_prompt="blue", steps=STEPS, width=width, height=width)
    choice = Choice()
    helpers.choose = choice
    times: dict[bool, list[float]] = {False: [], True: []}
    helped: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hosted = {
            "one": [*resolved.models.values()],
            "two": [resolved.models["transformer"]],
        }
        nodes = [start(folder, each, hosted[each]) for each in NAMES]
        gateway = Gateway(GatewayConfig(shm_dir=folder / "shm"))
        await gateway.start()
        try:
            gateway.set_workflows({"assist": resolved})
            gateway.set_nodes([f"unix:{folder}/{each}.sock" for each in NAMES])
            model = resolved.models["transformer"].identity
            while len(serving(gateway.fleet.states(), model)) < len(NAMES):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            for turn in range(-2, 2 * rounds):
                # A B, B A, A B, …: drift falls on both.
                choice.divide = (turn + turn // 2) % 2 == 1
                seconds, steps = await denoised(gateway, case)
                if turn >= 0:
                    times[choice.divide].append(seconds)
                    helped += [steps] if choice.divide else []
        finally:
            await gateway.stop()
            for process in nodes:
                process.terminate()
            for process in nodes:
                process.wait(30)
    alone, divided = (statistics.median(times[each]) for each in (False, True))
    return {
        "machine": machine(),
        "load": os.getloadavg()[0],
        "width": width,
        "steps": STEPS,
        "rounds": rounds,
        "steps_helped": statistics.median(helped),
        "alone_seconds": alone,
        "divided_seconds": divided,
        "ratio": divided / alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="measured pairs")
    parser.add_argument("--width", type=int, default=128, help="pixels of a side")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    figures = json.dumps(asyncio.run(measure(args.rounds, args.width)), indent=2)
    print(figures)
    if args.json is not None:
        args.json.write_text(figures + "\n")


if __name__ == "__main__":
    main()
