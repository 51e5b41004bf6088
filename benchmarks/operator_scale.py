# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How the operator does with 500 workflows over 100 models, against a real API server.

    python -m benchmarks.operator_scale [--workflows 500] [--pipelines 20] [--edits 50]

etcd, the API server, the Deployment and garbage collection controllers and the operator share this
machine; a fake kubelet writes pods' statuses, and a fake node answers for all of them. Measured are
a cold start (every workflow is there, nothing of the operator's making is), the operator's memory,
edits of a workflow until they are in its Deployment, and a restart in the settled namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import RESULTS, machine
from tests.cluster.kube import CRDS, ControlPlane, Kube, is_true
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.fake_node import FakeNode
from tests.cluster.operator.running import OperatorProcess
from tests.cluster.operator.wanted import models_of, models_of_all, pipeline, workflow

NAMESPACE = "bench"
CSV = RESULTS / "operator_scale.csv"
PATIENCE = 900.0


@dataclass(frozen=True)
class Figure:
    """One measured number. `goal` is the largest value that is good; None: for context."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    note: str = ""

    @property
    def reached(self) -> str:
        return "" if self.goal is None else "yes" if self.value <= self.goal else "NO"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a goal was missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.operator_scale", description=__doc__)
    parser.add_argument("--workflows", type=int, default=500)
    parser.add_argument("--pipelines", type=int, default=20, help="of five models each")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--csv", type=Path, default=CSV, help="default: %(default)s")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        figures = run(Path(folder), options.workflows, options.pipelines, options.edits)
    show(figures)
    write(figures, options.csv)
    return int(any(figure.reached == "NO" for figure in figures))


def run(folder: Path, workflows: int, pipelines: int, edits: int) -> list[Figure]:
    with contextlib.ExitStack() as stack:
        plane = ControlPlane(folder / "plane")
        stack.callback(plane.stop)
        plane.start(crds=CRDS)
        kube = plane.kube().within(NAMESPACE)
        stack.callback(kube.close)
        kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        uris = [pipeline(folder / f"p{number}") for number in range(pipelines)]
        there = [workflow(f"w{number:04}", uris[number % pipelines]) for number in range(workflows)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(kube.apply, there))
        stack.enter_context(FakeNode())
        stack.enter_context(FakeKubelet(kube))
        operator = OperatorProcess(
            folder / "operator", plane, plane.tokens["admin"], namespace=NAMESPACE, logLevel="INFO"
        )
        stack.callback(operator.stop)
        return [
            *cold_start(kube, operator, there),
            *edited(kube, uris, there, edits),
            planning(operator),
            memory(operator, "resident memory after the edits", 300.0),
            *restarted(plane, kube, operator, workflows),
        ]


def cold_start(kube: Kube, operator: OperatorProcess, there: list[dict]) -> list[Figure]:
    models = len(models_of_all(there))
    begin = time.perf_counter()
    operator.start()
    settled(kube, len(there))
    seconds = time.perf_counter() - begin
    writes = operator.metric("writes_total")
    what = f"{len(there)} workflows over {models} models"
    return [
        Figure("cold start until every workflow is Ready", seconds, "s", 120.0, what),
        Figure("writes of the cold start", writes, "", None, "objects changed, events included"),
        memory(operator, "resident memory after the cold start", 300.0),
    ]


def settled(kube: Kube, count: int) -> None:
    """Until so many workflows are Ready at their newest generation."""
    ready = is_true("Ready")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if sum(map(ready, kube.list("dwf"))) == count:
            return
        time.sleep(0.5)
    raise TimeoutError(f"not {count} workflows Ready after {PATIENCE:g} s")


def quiet(operator: OperatorProcess, seconds: float = 5.0) -> None:
    """Until the operator has written nothing for so long: the edits' pods have been replaced."""
    written, since = -1.0, 0.0
    while time.monotonic() - since < seconds:
        now = operator.metric("writes_total")
        if now != written:
            written, since = now, time.monotonic()
        time.sleep(0.5)


def edited(kube: Kube, uris: list[str], there: list[dict], edits: int) -> list[Figure]:
    """Seconds from an edit of a workflow's resources to the Deployment that has them."""
    # The oldest workflow of a pipeline is the one whose word counts.
    taken: list[float] = []
    ages = {w["metadata"]["name"]: w["metadata"]["creationTimestamp"] for w in kube.list("dwf")}
    oldest = {}
    for each in sorted(there, key=lambda w: (ages[w["metadata"]["name"]], w["metadata"]["name"])):
        oldest.setdefault(each["spec"]["pipeline"]["source"]["uri"], each)
    for number in range(edits):
        chosen = oldest[uris[number % len(uris)]]
        cpu = f"{100 + number}m"
        models = {"vae": {"resources": {"requests": {"cpu": cpu}}}}
        changed = workflow(
            chosen["metadata"]["name"], chosen["spec"]["pipeline"]["source"]["uri"], models=models
        )
        name = models_of(changed)["vae"]
        begin = time.perf_counter()
        kube.apply(changed)
        kube.wait_for("Deployment", name, lambda found, cpu=cpu: requested(found) == cpu)
        taken.append(time.perf_counter() - begin)
    ordered = sorted(taken)
    note = f"{edits} edits, one after the other"
    return [
        Figure("edit visible in its Deployment, median", statistics.median(taken), "s", None, note),
        Figure("edit visible in its Deployment, p95", ordered[int(0.95 * edits)], "s", 2.0, note),
        Figure("edit visible in its Deployment, worst", ordered[-1], "s", None, note),
    ]


def requested(deployment: dict) -> str:
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return container.get("resources", {}).get("requests", {}).get("cpu", "")


def restarted(
    plane: ControlPlane, kube: Kube, operator: OperatorProcess, workflows: int
) -> Iterator[Figure]:
    """A restart where nothing is to do: how long until it knows, and what it writes."""
    settled(kube, workflows)
    quiet(operator)
    operator.kill()
    mark = plane.now()
    begin = time.perf_counter()
    operator.start()
    operator.wait_ready(PATIENCE)
    while not operator.metric("reconcile_seconds_count", outcome="ok"):
        time.sleep(0.1)
    yield Figure("restart until the first round is done", time.perf_counter() - begin, "s")
    time.sleep(5)
    agent = [w for w in plane.writes(mark) if "python" in w.get("userAgent", "").lower()]
    mine = [w for w in agent if w["objectRef"].get("namespace") == NAMESPACE]
    kinds = {w["objectRef"]["resource"] for w in mine} - {"pods"}
    yield Figure("kinds written by the restart", float(len(kinds)), "", 0.0, ", ".join(kinds))


def planning(operator: OperatorProcess) -> Figure:
    """Of all rounds so far."""
    rounds = operator.metric("plan_seconds_count")
    mean = 1000 * operator.metric("plan_seconds_sum") / rounds
    return Figure("planning the namespace once, mean", mean, "ms", None, f"{rounds:.0f} rounds")


def memory(operator: OperatorProcess, name: str, goal: float) -> Figure:
    return Figure(name, operator.rss / 2**20, "MiB", goal)


def show(figures: Sequence[Figure]) -> None:
    print(machine())
    for figure in figures:
        goal = "" if figure.goal is None else f"goal <= {figure.goal:g}: {figure.reached}"
        note = f"({figure.note})" if figure.note else ""
        print(f"{figure.name:<45}{figure.value:>10.2f} {figure.unit:<4} {goal:<22} {note}")


def write(figures: Sequence[Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "value", "unit", "goal", "reached", "note"])
        writer.writeheader()
        for figure in figures:
            row = {**asdict(figure), "value": f"{figure.value:.3f}", "reached": figure.reached}
            writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
