# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The simulator against reality: python -m benchmarks.reality [--load L] [--seconds N] [--seed N].

Four node processes with stand-in models of known times (their steps sleep, so that no CPU is short)
under a gateway that a policy leads, and Poisson requests at 0.3, 0.6 and 0.9 of what the nodes can
do, sent whether or not earlier ones are done. Then the same requests in the simulator, with the
times that the gateway had learnt before the first of them, the same residency and the same policy.
Requests that are shed, fail or are late are missed; latencies are of those that were on time.

Rows go to results/fleet/reality.csv, in place of those of the same policy, load and seed. With
`--policy queue`, which no simulator knows, they say what such a gateway serves of the same
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import multiprocessing
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc.aio
from google.protobuf import json_format

from benchmarks.common import RESULTS
from benchmarks.peers import standin_service
from kubediffusion import rpc
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.server import Doors, serve
from kubediffusion.scheduling.pipelines import Job
from kubediffusion.scheduling.policies.kubediffusion import KubeDiffusion
from kubediffusion.scheduling.policies.live import QUEUE, live_parameters
from kubediffusion.simulate.engine import Simulation
from kubediffusion.simulate.fleet import records
from kubediffusion.simulate.machines import Machine
from kubediffusion.simulate.scenario import quantile
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc, node_pb2, tensor_pb2
from kubediffusion.workflow import ResolvedWorkflow

LOADS = (0.3, 0.6, 0.9)
WARM_UP = 6  # requests of each workflow, one after the other
SCALE = 2.0  # deadlines, of the solo time
# Seconds of an encoding, a step and a decoding; steps.
WORKFLOWS = {"small": (0.05, 0.05, 8, 0.1), "large": (0.05, 0.1, 12, 0.1)}
# Two nodes for both, and one for each.
NODES = (("small", "large"), ("small", "large"), ("small",), ("large",))
GOALS = {"attainment": 0.03, "median": 0.05, "p95": 0.15}


@dataclass(frozen=True)
class Row:
    """Latencies in seconds; differences of latencies are shares of the simulated ones."""

    policy: str
    load: float
    seed: int
    requests: int
    attainment_live: float
    median_live: float
    p95_live: float
    attainment_simulated: float | None = None
    median_simulated: float | None = None
    p95_simulated: float | None = None
    attainment_difference: float | None = None
    median_difference: float | None = None
    p95_difference: float | None = None
    reached: bool | None = None


@dataclass(frozen=True)
class Arrival:
    time: float
    workflow: str
    deadline: float  # seconds from the arrival


def workflow(name: str) -> ResolvedWorkflow:
    encode, step, _, decode = WORKFLOWS[name]
    base = standin_service.three_stages()
    seconds = {"text_encoder": encode, "transformer": step, "vae": decode}
    models = {
        role: replace(
            ref,
            # Both share their encoder and their decoder.
            identity=f"transformer-{name}" if role == "transformer" else role,
            options={"step_seconds": str(seconds[role])},
        )
        for role, ref in base.models.items()
    }
    return replace(base, name=name, models=models)


def solo_seconds(name: str) -> float:
    encode, step, steps, decode = WORKFLOWS[name]
    return encode + steps * step + decode


def arrivals(load: float, seconds: float, seed: int) -> list[Arrival]:
    draw = random.Random(f"{seed} {load}")
    mean = sum(solo_seconds(name) for name in WORKFLOWS) / len(WORKFLOWS)
    rate = load * len(NODES) / mean
    now, out = draw.expovariate(rate), list[Arrival]()
    while now < seconds:
        name = draw.choice(list(WORKFLOWS))
        out.append(Arrival(now, name, SCALE * solo_seconds(name)))
        now += draw.expovariate(rate)
    return out


# ---------------------------------------------------------------- live


@asynccontextmanager
async def service(folder: Path, policy: str) -> AsyncIterator[Gateway]:
    """Node processes, and a gateway at `gateway.sock` that knows all of them."""
    workflows = {name: workflow(name) for name in WORKFLOWS}
    context = multiprocessing.get_context("spawn")
    addresses = [f"unix:{folder}/node-{number}.sock" for number in range(len(NODES))]
    processes = [
        context.Process(
            target=standin_service.serve_node,
            args=(f"node-{number}", address, _residency(folder, number, workflows)),
            daemon=True,
        )
        for number, address in enumerate(addresses)
    ]
    gateway = Gateway(GatewayConfig(policy=policy))
    wanted = sum(2 + len(names) for names in NODES)
    try:
        for process in processes:
            process.start()
        await gateway.start()
        gateway.set_workflows(workflows)
        gateway.set_nodes(addresses)
        async with asyncio.timeout(120):
            while sum(len(state.ready) for state in gateway.fleet.states()) < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        async with serve(gateway, Doors(grpc=f"unix:{folder}/gateway.sock")):
            yield gateway
    finally:
        await gateway.stop()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(10)


def _residency(folder: Path, number: int, workflows: Mapping[str, ResolvedWorkflow]) -> Path:
    refs = {ref.identity: ref for name in NODES[number] for ref in workflows[name].models.values()}
    specs = [standin_service.model_spec(ref) for ref in refs.values()]
    path = folder / f"node-{number}.json"
    plan = node_pb2.SetResidencyRequest(generation=1, models=specs)
    path.write_text(json_format.MessageToJson(plan))
    return path


class Client:
    def __init__(self, address: str) -> None:
        self._channel = rpc.connect(address)
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    async def one(self, name: str, seed: int, deadline: float | None = None) -> float | None:
        """The seconds until the image came; None where it did not."""
        request = gateway_pb2.GenerateRequest(
            workflow=name,
            inputs={
                "prompt": tensor_pb2.Value(text=f"number {seed}"),
                "steps": tensor_pb2.Value(integer=WORKFLOWS[name][2]),
                "seed": tensor_pb2.Value(integer=seed),
            },
        )
        if deadline is not None:
            request.deadline_ms = round(deadline * 1000)
        loop = asyncio.get_running_loop()
        begin, took = loop.time(), None
        try:
            async for event in self._stub.Generate(request):
                if event.WhichOneof("kind") == "image":
                    took = loop.time() - begin
        except grpc.aio.AioRpcError as error:
            expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
            if error.code() not in expected:
                raise
        return took

    async def replay(self, trace: Sequence[Arrival]) -> list[float | None]:
        async with asyncio.TaskGroup() as group:
            loop = asyncio.get_running_loop()
            begin = loop.time()
            tasks: list[asyncio.Task[float | None]] = []
            for number, arrival in enumerate(trace):
                await asyncio.sleep(max(0.0, begin + arrival.time - loop.time()))
                one = self.one(arrival.workflow, number, arrival.deadline)
                tasks.append(group.create_task(one))
        return [task.result() for task in tasks]

    async def close(self) -> None:
        await self._channel.close()


# ---------------------------------------------------------------- simulated


def simulated(gateway: Gateway, policy: str, trace: Sequence[Arrival]) -> list[float | None]:
    """The same with the times that the gateway knows now."""
    driver = gateway.driver
    assert driver is not None, "a gateway with a policy"
    costs, pipelines = driver.known()
    by_family = {pipeline.family: pipeline for pipeline in pipelines}
    machines = [Machine(node.index, node.host, float("inf")) for node in driver.records.nodes]
    for machine, node in zip(machines, driver.records.nodes, strict=True):
        for use in node.resident:
            machine.put(use, 0.0)
    jobs = [
        Job(
            number,
            by_family[each.workflow],
            each.time,
            each.time + each.deadline,
            by_family[each.workflow].solo_seconds(costs),
        )
        for number, each in enumerate(trace)
    ]
    lead = KubeDiffusion(records(machines), costs, pipelines, live_parameters(policy))
    finished = Simulation(machines, [lead], jobs, costs).run().finished
    return [
        finished[job.id] - job.arrival if job.id in finished else None for job in jobs
    ]  # in the order of arrival


# ---------------------------------------------------------------- both


@dataclass(frozen=True)
class Figures:
    attainment: float
    median: float
    p95: float


def figures(trace: Sequence[Arrival], latencies: Sequence[float | None]) -> Figures:
    pairs = zip(trace, latencies, strict=True)
    on_time = sorted(took for each, took in pairs if took is not None and took <= each.deadline)
    median, p95 = (quantile(on_time, q) or float("nan") for q in (0.5, 0.95))
    return Figures(len(on_time) / len(trace), median, p95)


def row(
    policy: str, load: float, seed: int, count: int, live: Figures, expected: Figures | None
) -> Row:
    bare = Row(policy, load, seed, count, live.attainment, live.median, live.p95)
    if expected is None:
        return bare
    differences = {
        "attainment": live.attainment - expected.attainment,
        "median": live.median / expected.median - 1.0,
        "p95": live.p95 / expected.p95 - 1.0,
    }
    return replace(
        bare,
        attainment_simulated=expected.attainment,
        median_simulated=expected.median,
        p95_simulated=expected.p95,
        attainment_difference=differences["attainment"],
        median_difference=differences["median"],
        p95_difference=differences["p95"],
        reached=all(abs(differences[name]) <= goal for name, goal in GOALS.items()),
    )


async def measure(policy: str, loads: Sequence[float], seconds: float, seed: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        async with service(Path(folder), policy) as gateway:
            client = Client(f"unix:{folder}/gateway.sock")
            try:
                for number in range(WARM_UP):
                    for name in WORKFLOWS:
                        await client.one(name, number)
                for load in loads:
                    trace = arrivals(load, seconds, seed)
                    expected = None
                    if policy != QUEUE:
                        expected = figures(trace, simulated(gateway, policy, trace))
                    live = figures(trace, await client.replay(trace))
                    rows.append(row(policy, load, seed, len(trace), live, expected))
                    print(rows[-1], flush=True)
            finally:
                await client.close()
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """Beside the rows that are there of other policies, loads and seeds."""
    new = [{k: "" if v is None else _short(v) for k, v in asdict(row).items()} for row in rows]
    old: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    kept = {_key(each): each for each in (*old, *new)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept))


def _short(value: object) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _key(cells: Mapping[str, str]) -> tuple[str, float, int]:
    return (cells["policy"], float(cells["load"]), int(cells["seed"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="kubediffusion")
    parser.add_argument("--load", type=float, nargs="*", default=LOADS)
    parser.add_argument("--seconds", type=float, default=75.0, help="of each load")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    rows = asyncio.run(measure(asked.policy, asked.load, asked.seconds, asked.seed))
    write(rows, RESULTS / "fleet" / "reality.csv")


if __name__ == "__main__":
    main()
