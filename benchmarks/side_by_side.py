# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The whole service on tiny-sd3 beside its peers, in turn, with one thread a process.

Latency: end to end through the service against diffusers called in this very process.
Throughput and latency at 1, 4 and 16 clients: against a diffusers loop behind FastAPI, and
against a Ray Serve application made of the same three stages.
"""

from __future__ import annotations

import functools
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Row, alternate, at_least, at_most, timed
from kubediffusion.client import Client

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "models/tiny-sd3/pipeline"
WORKFLOW = ROOT / "examples/tiny-sd3.yaml"
PROMPT = "a red circle above a blue square"
STEPS, GUIDANCE, LENGTH = 28, 4.0, 32
# Under load, so that ten rounds of all peers end within half an hour; fewer steps a request
# leave more of the service's own cost in the figure.
LOAD_STEPS = 10
CLIENTS = (4, 16)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# (seed, steps) -> PNG
Generate = Callable[..., bytes]


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"{process.args} was not ready after {seconds} s")
        time.sleep(0.1)


@contextmanager
def _process(args: Sequence[str], ready: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen(args, env=ENV, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        _wait(ready, process, 120)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def kubediffusion(numerics: str) -> Iterator[Generate]:
    """Our service, started by its own CLI; called through the Python client."""
    with ExitStack() as stack:
        address = f"127.0.0.1:{_free_port()}"
        client = stack.enter_context(Client(address))

        def ready() -> bool:
            try:
                return any(w.ready for w in client.workflows())
            except Exception:
                return False

        command = [sys.executable, "-m", "kubediffusion.cli", "up", "-f", str(WORKFLOW)]
        stack.enter_context(_process([*command, "--grpc", address], ready))
        yield (
            lambda seed, steps: (
                client.image(
                    "tiny-sd3",
                    prompt=PROMPT,
                    seed=seed,
                    steps=steps,
                    guidance=GUIDANCE,
                    max_sequence_length=LENGTH,
                    numerics=numerics,
                ).png
            )
        )


@contextmanager
def fastapi_loop() -> Iterator[Generate]:
    with ExitStack() as stack:
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/peer.sock"
        command = [sys.executable, "-m", "benchmarks.peers.fastapi_loop", str(PIPELINE), path]
        stack.enter_context(_process(command, lambda: os.path.exists(path)))
        http = stack.enter_context(
            httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=600)
        )

        def generate(seed: int, steps: int) -> bytes:
            body: dict[str, Any] = {"prompt": PROMPT, "seed": seed, "steps": steps}
            answer = http.post("http://peer/generate", json=body)
            return answer.raise_for_status().content

        yield generate


@contextmanager
def ray_serve() -> Iterator[Generate]:
    from benchmarks.peers import ray_app

    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
    handle = ray_app.start(str(PIPELINE))
    try:
        yield lambda seed, steps: handle.generate.remote(
            PROMPT, seed, steps, GUIDANCE, LENGTH
        ).result()
    finally:
        ray_app.stop()


@contextmanager
def in_process() -> Iterator[Generate]:
    """diffusers itself, in this process, on one thread."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    torch.set_num_threads(1)
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)

    def generate(seed: int, steps: int) -> bytes:
        image = pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            max_sequence_length=LENGTH,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    yield generate


def load(generate: Generate, clients: int) -> Callable[[], float]:
    """Images a second of so many clients that come at once."""

    def run() -> float:
        with ThreadPoolExecutor(clients) as pool:
            ask = functools.partial(generate, steps=LOAD_STEPS)
            return clients / timed(lambda: list(pool.map(ask, range(clients))))

    return run


def _solo(generate: Generate) -> Callable[[], float]:
    return lambda: timed(lambda: generate(7, STEPS))


def run_latency(rounds: int) -> list[Row]:
    with kubediffusion("exact") as ours, in_process() as peer:
        same = ours(7, STEPS) == peer(7, STEPS)
        a, b = alternate(_solo(ours), _solo(peer), rounds)
    note = "bytes equal" if same else "BYTES DIFFER"
    return [at_most("service", "latency vs diffusers in one process", a, b, "s", 1.03, note)]


def run_fastapi(rounds: int) -> list[Row]:
    return _beside("FastAPI loop", fastapi_loop, rounds, latency=1.03, exact=0.97)


def run_ray(rounds: int) -> list[Row]:
    return _beside("Ray Serve", ray_serve, rounds, latency=1.0, exact=1.0)


def _beside(
    peer_name: str,
    peer_of: Callable[[], AbstractContextManager[Generate]],
    rounds: int,
    *,
    latency: float,
    exact: float,
) -> list[Row]:
    """At 1, 4 and 16 clients, in both numerics; `latency` and `exact` are goals of the ratio."""
    rows: list[Row] = []
    suite = "side by side"
    for numerics, least in (("exact", exact), ("fast", 1.0)):
        with kubediffusion(numerics) as ours, peer_of() as peer:
            name = f"{numerics}, 1 client vs {peer_name}"
            times = alternate(_solo(ours), _solo(peer), rounds)
            rows.append(at_most(suite, f"latency, {name}", *times, "s", latency))
            for clients in CLIENTS:
                name = f"{numerics}, {clients} clients vs {peer_name}"
                rates = alternate(load(ours, clients), load(peer, clients), rounds)
                what, note = f"throughput, {name}", f"{LOAD_STEPS} steps"
                rows.append(at_least(suite, what, *rates, "images/s", least, note))
    return rows
