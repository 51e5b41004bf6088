# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models are on this node: what the planner says.

Sources are fetched side by side; the device loads and unloads one model at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter

import torch

from kubediffusion import heap, tensors
from kubediffusion.errors import (
    Conflict,
    InvalidInput,
    KubeDiffusionError,
    SourceUnavailable,
)
from kubediffusion.models.base import Family, LoadSpec, Model
from kubediffusion.node.device import Device
from kubediffusion.node.failures import is_out_of_memory
from kubediffusion.node.library import Files, Library
from kubediffusion.node.needs import Needs
from kubediffusion.node.tasks import Resident
from kubediffusion.node.threads import in_thread
from kubediffusion.telemetry.metrics import NodeMetrics
from kubediffusion.v1alpha1 import node_pb2
from kubediffusion.workflow.colocation import is_helper

# A source that does not answer is asked again after 1, 2, 4, ... seconds, so often in all.
LOAD_ATTEMPTS = 6
FIRST_RETRY_SECONDS = 1.0
# A source that answers so will answer the same in a second.
LASTING = frozenset({"SourceNotFound", "RevisionNotFound", "Unauthorized", "Offline"})
MAX_MODELS = 256
# So many sources are read at a time: one that is slow must not keep the others' models away.
MAX_FETCHES = 4

PENDING = node_pb2.MODEL_STATE_PENDING
DOWNLOADING = node_pb2.MODEL_STATE_DOWNLOADING
LOADING = node_pb2.MODEL_STATE_LOADING
READY = node_pb2.MODEL_STATE_READY
FAILED = node_pb2.MODEL_STATE_FAILED
EVICTING = node_pb2.MODEL_STATE_EVICTING

log = logging.getLogger(__name__)


class OldGeneration(Conflict):
    reason = "OldGeneration"
    grpc_code = "FAILED_PRECONDITION"


def _load(family: Family, spec: LoadSpec) -> Model:
    model = family.load(spec)
    heap.settle()
    return model


class DoesNotFitError(KubeDiffusionError):
    reason = "OutOfMemory"


class Residency:
    """Plans come in by `plan`; a task of its own evicts what is no longer planned, then loads.

    A fetch whose model is no longer planned is let go: its thread ends by itself, and what it has
    brought stays in the cache.

    One failing model does not keep the others from serving. A failure that may pass (the source
    does not answer) is tried again; any other waits for a newer plan.
    """

    def __init__(
        self,
        device: Device,
        library: Library,
        metrics: NodeMetrics,
        *,
        device_name: str = "cpu",
        memory_limit: int = 0,
        compile_cache: Path | None = None,
        drain_seconds: float = 0.0,
        now: Callable[[], float],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """What is needed and no longer planned stays for `drain_seconds` at most."""
        self.generation = 0
        self.memory_limit = memory_limit
        self.needs = Needs()
        # Set by those who must know: stop what runs on it; something changed.
        self.on_evicting: Callable[[Resident], None] = lambda resident: None
        self.on_change = on_change
        self._device = device
        self._library = library
        self._metrics = metrics
        self._device_name = device_name
        self._compile_cache = compile_cache
        self._drain_seconds = drain_seconds
        self._now = now
        self._planner = ""
        self._planned: dict[str, node_pb2.ModelSpec] = {}
        self._residents: dict[str, Resident] = {}
        self._fetches: dict[str, asyncio.Task[Files]] = {}
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._carry_out(), name="residency")

    async def stop(self) -> None:
        tasks = [*self._fetches.values(), *filter(None, [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ what is asked

    def plan(self, generation: int, planner: str, specs: Sequence[node_pb2.ModelSpec]) -> None:
        """Takes a plan; `statuses` tells how far it is. Raises InvalidInput, OldGeneration."""
        planned = {spec.identity: spec for spec in specs}
        if "" in planned or len(planned) != len(specs) or len(specs) > MAX_MODELS:
            raise InvalidInput(
                f"a plan names each model once, by its identity, and {MAX_MODELS} at most",
                field="models",
            )
        if generation < self.generation:
            raise OldGeneration(
                f"generation {generation} is older than {self.generation} of {self._planner}",
                field="generation",
            )
        if generation == self.generation and set(planned) != set(self._planned) and self._planner:
            raise OldGeneration(
                f"generation {generation} was another plan; count it up with every change",
                field="generation",
            )
        repeated = generation == self.generation
        self.generation, self._planner, self._planned = generation, planner or "?", planned
        for identity, spec in planned.items():
            resident = self._residents.get(identity)
            if resident is None or (resident.status.state == FAILED and not repeated):
                self._enter(spec)
            else:
                resident.spec = spec  # its LoRAs may have changed; its identity says what may not
        self._work.set()
        self.needs.changed.set()
        self.on_change()

    @property
    def needed(self) -> bool:
        """Whether some gateway needs a model that is here."""
        return any(self.needs.count(identity) for identity in self.ready)

    def ready_model(self, identity: str) -> Resident | None:
        resident = self._residents.get(identity)
        return resident if resident is not None and resident.ready else None

    def statuses(self) -> list[node_pb2.ModelStatus]:
        for resident in self._residents.values():
            resident.status.downloaded_bytes = resident.progress.done
            resident.status.total_bytes = resident.progress.total
            resident.status.tasks = len(resident.tasks)
            resident.status.needed_by = self.needs.count(resident.identity)
        return [resident.status for resident in self._residents.values()]

    @property
    def ready(self) -> list[str]:
        return [identity for identity, resident in self._residents.items() if resident.ready]

    @property
    def settled(self) -> bool:
        """Every planned model is there, or has failed, and there is one to serve; or the planner
        wants none here, as of a spare node of a pool."""
        states = self._states(self._planned)
        if not states:
            return bool(self._planner)
        return READY in self._states(self._servers) and all(s in (READY, FAILED) for s in states)

    @property
    def serves(self) -> bool:
        """All that serves requests by itself is there or has failed, and some of it is there: a
        ControlNet that joins keeps nobody waiting who does not ask for it."""
        states = self._states(self._servers)
        return READY in states and all(state in (READY, FAILED) for state in states)

    @property
    def hopeless(self) -> str:
        """Why there is nothing to serve and never will be, a line for each model; else empty.

        A model whose source may yet answer is no failure as long as it is tried again.
        """
        servers = self._servers
        states = self._states(servers)
        if not states or any(state != FAILED for state in states):
            return ""
        failed = [self._residents[identity].status for identity in servers]
        return "\n".join(f"{status.reason}: {status.message}" for status in failed)

    @property
    def _servers(self) -> list[str]:
        """The planned models but for ControlNets, which serve nobody without a denoiser; where
        there is nothing else, these."""
        servers = [i for i, spec in self._planned.items() if not is_helper(spec.component)]
        return servers or list(self._planned)

    @property
    def busy(self) -> bool:
        """Whether a model is being loaded or unloaded: the device does that between two steps."""
        states = {resident.status.state for resident in self._residents.values()}
        return LOADING in states or EVICTING in states

    def _states(self, planned: Iterable[str]) -> list[node_pb2.ModelState]:
        return [
            self._residents[identity].status.state if identity in self._residents else PENDING
            for identity in planned
        ]

    @property
    def memory_used(self) -> int:
        return sum(r.status.nbytes for r in self._residents.values() if r.model is not None)

    def measured(self) -> list[Resident]:
        """The models that count something of themselves."""
        return [r for r in self._residents.values() if r.measured is not None]

    def known_stages(self) -> set[tuple[str, str]]:
        return {(r.identity, stage) for r in self._residents.values() for stage in r.status.stages}

    # ------------------------------------------------------------ carrying it out

    def _enter(self, spec: node_pb2.ModelSpec) -> None:
        status = node_pb2.ModelStatus(identity=spec.identity, state=PENDING)
        resident = Resident(spec, status)
        self._residents[spec.identity] = resident
        self._set(resident, PENDING)

    async def _carry_out(self) -> None:
        while True:
            self._work.clear()
            surplus = [r for i, r in self._residents.items() if i not in self._planned]
            if surplus:
                # First out, then in; together, since each may have to wait for its tasks.
                await asyncio.gather(*(self._evict(resident) for resident in surplus))
                continue
            due = self._fetch_due()
            fetched = next((i for i, fetch in self._fetches.items() if fetch.done()), None)
            if fetched is not None:
                await self._bring_in(self._residents[fetched], self._fetches.pop(fetched))
                continue
            try:
                async with asyncio.timeout(None if due is None else max(0, due - self._now())):
                    await self._work.wait()
            except TimeoutError:
                continue

    def _fetch_due(self) -> float | None:
        """Begins the fetches that may begin. When the next one may, where that is known."""
        pending = sorted(
            (
                resident
                for identity in self._planned
                if identity not in self._fetches
                and (resident := self._residents[identity]).status.state == PENDING
            ),
            key=lambda resident: resident.retry_at,
        )
        for resident in pending:
            if len(self._fetches) >= MAX_FETCHES:
                return None
            if resident.retry_at > self._now():
                return resident.retry_at
            self._begin_fetch(resident)
        return None

    def _begin_fetch(self, resident: Resident) -> None:
        resident.attempts += 1
        self._set(resident, DOWNLOADING)
        fetch = asyncio.create_task(self._fetch(resident), name=f"fetch {resident.identity}")
        fetch.add_done_callback(lambda _: self._work.set())
        self._fetches[resident.identity] = fetch

    async def _fetch(self, resident: Resident) -> Files:
        self._library.family(resident.spec)  # an unknown one needs no download to fail
        return await in_thread(self._library.fetch, resident.spec, resident.progress)

    async def _evict(self, resident: Resident) -> None:
        """Once nobody needs it, its leases are given back at their next step and its one-shot tasks
        end; then it goes. Not, where it is planned again before that."""
        if fetch := self._fetches.pop(resident.identity, None):
            fetch.cancel()
        if resident.model is not None:
            await self._unneeded(resident.identity)
            if resident.identity in self._planned:
                return
            self._set(resident, EVICTING)
            self.on_evicting(resident)
            await resident.idle.wait()
            try:
                await self._device.call(lambda: self._unload(resident))
                log.info("evicted %s", resident.identity)
            except Exception as error:  # the next plan must be carried out all the same
                log.error("unloading %s failed", resident.identity, exc_info=error)
        del self._residents[resident.identity]
        self._metrics.forget(resident.identity, list(resident.status.stages))
        if resident.identity in self._planned:  # wanted again meanwhile
            self._enter(self._planned[resident.identity])
        self.on_change()

    async def _unneeded(self, identity: str) -> None:
        """Waits while some gateway needs it, for so long as a node that drains would."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                while identity not in self._planned and self.needs.count(identity):
                    self.needs.changed.clear()
                    await self.needs.changed.wait()

    async def _bring_in(self, resident: Resident, fetch: asyncio.Task[Files]) -> None:
        try:
            model = await self._load(resident, await fetch)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(resident, error)
            return
        resident.hold(model)
        status = resident.status
        self._metrics.known(resident.identity, model.stages)
        self._metrics.model_load_seconds.labels(resident.identity).observe(status.load_seconds)
        self._metrics.model_resident_bytes.labels(resident.identity).set(model.nbytes)
        self._set(resident, READY)
        log.info(
            "loaded %s (%s %s, %d bytes) in %.2f s",
            resident.identity,
            resident.spec.family,
            resident.spec.component,
            model.nbytes,
            status.load_seconds,
        )

    async def _load(self, resident: Resident, files: Files) -> Model:
        status, spec = resident.status, resident.spec
        family = self._library.family(spec)
        status.digest = files.weights.digest
        # A planner must know why it does not fit: told before, and told again once it is loaded.
        status.nbytes = files.weights.nbytes
        self._check_fits(files.weights.nbytes)
        self._set(resident, LOADING)
        load_spec = LoadSpec(
            identity=spec.identity,
            family=spec.family,
            component=spec.component,
            path=files.path,
            pipeline_path=files.pipeline_path,
            dtype=spec.dtype or "float32",
            variant=spec.variant,
            class_name=spec.class_name,
            device=self._device_name,
            options=dict(spec.options),
            pruning_path=files.pruning_path,
            compile_cache=self._compile_cache,
        )
        begin = perf_counter()
        model = await self._device.call(lambda: _load(family, load_spec))
        status.load_seconds = perf_counter() - begin
        status.nbytes = model.nbytes
        try:
            self._check_fits(model.nbytes)
            _describe(model, status)
        except Exception:
            await self._device.call(model.unload)
            raise
        return model

    def _check_fits(self, nbytes: int) -> None:
        if self.memory_limit and self.memory_used + nbytes > self.memory_limit:
            raise DoesNotFitError(
                f"it takes {nbytes} bytes, and {self.memory_used} of {self.memory_limit} are in "
                "use; raise the node's memory limit, or plan fewer models on it"
            )

    def _failed(self, resident: Resident, error: Exception) -> None:
        status = resident.status
        if is_out_of_memory(error):
            status.reason, status.message = "OutOfMemory", str(error).splitlines()[0]
        elif isinstance(error, KubeDiffusionError):
            status.reason, status.message = error.reason, str(error)
        else:
            log.error("loading %s failed", resident.identity, exc_info=error)
            status.reason = "LoadFailed"
            status.message = f"unexpected {type(error).__name__}: {error}"
        again = (
            isinstance(error, SourceUnavailable)
            and error.reason not in LASTING
            and resident.attempts < LOAD_ATTEMPTS
        )
        if again:
            pause = FIRST_RETRY_SECONDS * 2 ** (resident.attempts - 1)
            resident.retry_at = self._now() + pause
            log.warning("%s: %s; again in %g s", resident.identity, status.message, pause)
        else:
            log.error("%s: %s: %s", resident.identity, status.reason, status.message)
        self._metrics.model_failures.labels(resident.identity, status.reason).inc()
        self._set(resident, PENDING if again else FAILED)

    def _set(self, resident: Resident, state: node_pb2.ModelState) -> None:
        status = resident.status
        status.state = state
        if state in (READY, LOADING):
            status.reason = status.message = ""
        word = node_pb2.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()
        self._metrics.set_model_state(resident.identity, word)
        self.on_change()

    @staticmethod
    def _unload(resident: Resident) -> None:
        resident.loaded.unload()
        resident.hold(None)
        heap.resettle()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _describe(model: Model, status: node_pb2.ModelStatus) -> None:
    """Raises where the model says something of itself that cannot be told."""
    facts = {name: tensors.encode_value(fact) for name, fact in model.facts.items()}
    stages = list(model.stages)
    status.nbytes = model.nbytes
    for name, value in facts.items():
        status.facts[name].CopyFrom(value)
    status.stages[:] = stages
