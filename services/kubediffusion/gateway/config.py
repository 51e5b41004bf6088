# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Everything a gateway can be told, with the values that hold when it is told nothing."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from kubediffusion.scheduling.admission import AdmissionLimits
from kubediffusion.scheduling.policies.live import QUEUE


def _new_id() -> str:
    return f"gateway-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """How a gateway treats its nodes; all in seconds."""

    # What this gateway left on a node is freed when it has been silent for so long.
    lease: int = 30
    welcome: float = 10.0
    # Silent for so long: not chosen if there is another. And then: taken for dead.
    suspect: float = 5.0
    dead: float = 30.0
    reconnect_first: float = 0.05
    reconnect_most: float = 1.0


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How often a lost task runs again. Waiting for a node to come up is not an attempt."""

    attempts: int = 8
    # A task that fails by itself, rather than with its node, will hardly do better elsewhere.
    internal_attempts: int = 3
    backoff_first: float = 0.05
    backoff_most: float = 2.0


@dataclass(frozen=True, slots=True)
class KeptResults:
    """Finished requests with an idempotency key, kept for retries."""

    seconds: float = 600.0
    count: int = 1024
    nbytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class JobLimits:
    """The job store: `running` at once in a gateway, `waiting` behind them in the database, and
    what is kept of ended ones. Times in seconds."""

    running: int = 16
    waiting: int = 1024
    # Gateways that share a database take over what one of them has not renewed for so long; their
    # clocks have to agree to within a part of that. Each looks about once a `beat`.
    lease: float = 30.0
    beat: float = 2.0
    # A job that more gateways than these vanished with is not tried again.
    losses: int = 5
    # Between two writes of one job's checkpoints.
    checkpoint_every: float = 2.0
    # How long Cancel waits for another gateway to end a job.
    cancel_wait: float = 10.0
    count: int = 10_000
    image_bytes: int = 1024 * 1024 * 1024
    seconds: float = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    gateway_id: str = field(default_factory=_new_id)
    nodes: NodeLimits = field(default_factory=NodeLimits)
    retries: RetryLimits = field(default_factory=RetryLimits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    results: KeptResults = field(default_factory=KeptResults)
    jobs: JobLimits = field(default_factory=JobLimits)
    # Who says which node runs what, and when: a name of `scheduling.policies.live`.
    policy: str = QUEUE
    max_images: int = 16
    # Steps between two checkpoints: no more than these run twice when a node dies.
    checkpoint_every: int = 5
    # What `kubediffusion profile` wrote: run times until the gateway has measured its own.
    profiles: Path | None = None
    # An SQLAlchemy URL; jobs in memory end with the process.
    job_database: str = "sqlite://"
    # Where images of jobs go, as a URL of fsspec; empty: into the database.
    job_results: str = ""
    # "module:object" of each hook, in the order they are applied.
    hooks: tuple[str, ...] = ()
    worker_threads: int = 2
    # Where the nodes of this machine put tensors, if they share one with the gateway.
    shm_dir: Path | None = None
