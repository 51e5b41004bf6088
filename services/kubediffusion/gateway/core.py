# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The gateway itself, without any server: requests in, events out.

    flight = a client's request    (flights.py)      its images, its listeners
      run  = one image of it       (coordinator.py)  its tasks over the nodes
        attempt = a task on a node (attempts.py)

Everything runs on one event loop. Decoding uploads, hooks and PNG run in worker threads.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kubediffusion import workflow as wf
from kubediffusion.errors import DeadlineExceeded, NotFound, Overloaded, Unavailable
from kubediffusion.gateway import planning
from kubediffusion.gateway.admission import admit, promised_seconds, solo_seconds
from kubediffusion.gateway.checkpoints import Checkpoints
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.gateway.delivery import Delivery
from kubediffusion.gateway.driver import PolicyDriver
from kubediffusion.gateway.flights import Events, Flight, Subscriber
from kubediffusion.gateway.hooks import load_hooks
from kubediffusion.gateway.jobs import Jobs
from kubediffusion.gateway.known_times import read_profiles
from kubediffusion.gateway.measures import Measures, stages_of
from kubediffusion.gateway.nodes import Facts, Fleet
from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.gateway.results import Results
from kubediffusion.gateway.status import describe_gateway, describe_workflow
from kubediffusion.scheduling.policies.live import QUEUE
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.tensors import Fetcher
from kubediffusion.v1alpha1 import gateway_pb2


class Gateway:
    """See the module. Use `start`, then anything, then `stop`, all on one event loop."""

    def __init__(
        self, config: GatewayConfig | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config or GatewayConfig()
        self.profiles = Profiles()
        if self.config.profiles is not None:
            read_profiles(self.config.profiles, self.profiles)
        self.fleet = Fleet(self.config.gateway_id, self.config.nodes, now, self.profiles)
        self.workflows: dict[str, wf.ResolvedWorkflow] = {}
        self.flights: set[Flight] = set()
        self.jobs = Jobs(
            self, self.config.job_database, self.config.jobs, results=self.config.job_results
        )
        self.measures = Measures(self)
        # Without one, placement is task by task.
        self.driver: PolicyDriver | None = None
        if self.config.policy != QUEUE:
            self.driver = PolicyDriver(self.config.policy, self.fleet, now, self._shed)
        self._now = now
        self._since = now()
        self._hooks = load_hooks(self.config.hooks)
        self._workers = ThreadPoolExecutor(self.config.worker_threads, "gateway-worker")
        self._delivery = Delivery(Fetcher(shm_dir=self.config.shm_dir), self._hooks, self._workers)
        self._results = Results(self.config.results, now)
        # Why it cannot be known yet which workflows there are; empty as soon as it is.
        self.unsynced = ""
        self._in_flight = 0
        # What requests of workflows that have changed since, or are gone, will still use.
        self._outdated: dict[Flight, frozenset[str]] = {}
        self._needed: Counter[str] = Counter()
        self._stopping = False
        self._idle: asyncio.Future[None] | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        await self.jobs.start()
        self.measures.start()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """As `drain`, and then ends the gateway itself."""
        await self.drain(drain_seconds)
        if self.driver is not None:
            self.driver.stop()
        await self.fleet.stop()
        await self._delivery.close()
        self.measures.stop()
        self._workers.shutdown(wait=True, cancel_futures=True)

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, gives what is under way so long to end, and then ends it: its clients
        are told to send it again, for another gateway. Safe to call again."""
        self._stopping = True
        self.jobs.close()
        if self.flights and seconds > 0:
            await self._drained(seconds)
        await self.jobs.stop()
        for flight in list(self.flights):
            flight.end(Unavailable("the gateway is shutting down; send the request again"))

    async def _drained(self, seconds: float) -> None:
        self._idle = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._idle], timeout=seconds)

    def set_workflows(
        self, workflows: Mapping[str, wf.ResolvedWorkflow], draining: Iterable[str] = ()
    ) -> None:
        """The workflows to serve from now on; requests under way end with what they began with.

        `draining` are models that stay for these. One that needs a model which is not there and
        which nobody keeps, because its workflow was deleted, say, fails at once; but what has begun
        ends on nodes that are going.
        """
        self.workflows = dict(workflows)
        self._outdated = {
            flight: planning.models_needed(flight.order)
            for flight in self.flights
            if flight.order is not None and self._is_outdated(flight.order)
        }
        self._needed = Counter(model for each in self._outdated.values() for model in each)
        self.fleet.need(frozenset(self._needed))
        models = {ref.identity for each in workflows.values() for ref in each.models.values()}
        kept = self.fleet.forget_models(frozenset(models))
        if self.driver is not None:
            self.driver.forget_models(kept)
        self.fleet.keep(frozenset(workflows), frozenset(models) | frozenset(draining))

    def _is_outdated(self, order: planning.Order) -> bool:
        return self.workflows.get(order.workflow.name) != order.workflow

    def set_nodes(self, addresses: Sequence[str]) -> None:
        self.fleet.set_nodes(addresses)

    # ------------------------------------------------------------ requests

    def generate(
        self, request: gateway_pb2.GenerateRequest, checkpoints: Checkpoints | None = None
    ) -> Events:
        """What happens to the request, up to Finished. Closing the iterator cancels it.

        With `checkpoints` it goes on from those that are found there, and keeps its own in them.

        Its first event may raise InvalidInput, NotFound, Conflict, Overloaded or Unavailable, and
        any later one DeadlineExceeded, Unavailable or Internal.
        """
        return Events(lambda: self._join_or_begin(request, checkpoints))

    async def check(self, request: gateway_pb2.GenerateRequest) -> None:
        """Raises what `generate` would raise of a request that is wrong in itself."""
        order = self._order(request)
        await self._check_contents(order)
        order.check(self._facts(order))

    def _join_or_begin(
        self, request: gateway_pb2.GenerateRequest, checkpoints: Checkpoints | None
    ) -> Subscriber:
        if self._stopping:
            raise Unavailable("the gateway is shutting down; send the request to another one")
        keyed = bool(request.idempotency_key)
        if keyed and (joined := self._results.find(request)) is not None:
            return joined.subscribe()
        flight = Flight(
            secrets.token_hex(16),
            request,
            self._delivery,
            self.measures,
            keep=keyed,
            now=self._now,
            on_end=self._ended,
            checkpoints=checkpoints,
        )
        self.flights.add(flight)
        if keyed:
            self._results.add(request, flight)
        subscriber = flight.subscribe()  # before there is anything to hear
        with flight.failing():
            order = flight.order = self._order(request)
            if self._has_contents(order) or self._unseen(order):
                flight.spawn(self._launch_later(flight, order))
            else:
                # Most requests wait for nothing, and need no asyncio task to do so.
                self._launch(flight, order, self._facts(order))
        return subscriber

    async def _launch_later(self, flight: Flight, order: planning.Order) -> None:
        """Once its uploads and hooks were seen to, and its models have been up."""
        await self._check_contents(order)
        facts = self._facts(order)
        if self._unseen(order):
            # What is wrong in itself is said now, and not when the models are there.
            order.check(facts)
            self._admit(flight, order, [], None, cold=True)
            flight.held_stages = self._missing_stages(order)
            facts = await self._facts_in_time(flight, order)
        self._launch(flight, order, facts)

    def _launch(self, flight: Flight, order: planning.Order, facts: Mapping[str, Facts]) -> None:
        """Sends its tasks on their way."""
        request, slo = flight.request, order.workflow.slo
        bound = order.bind(facts)
        plans = planning.plan_images(order, bound, facts, flight.request_id)
        tasks = plans[0].tasks
        solo = solo_seconds(tasks, self.profiles)
        promised = promised_seconds(slo, solo)
        if request.HasField("deadline_ms"):
            promised = request.deadline_ms / 1000
        cold = bool(self.fleet.missing([task.model for task in tasks]))
        ahead = self._in_flight
        self._admit(flight, order, tasks, promised, cold=cold, solo=solo)
        deadline = None if promised is None else flight.since + promised
        runs = [
            ImageRun(
                replace(
                    flight.resuming(plan),
                    previews=request.previews,
                    deadline=deadline,
                    strict=request.HasField("deadline_ms"),
                    activation_timeout=slo.activation_timeout_seconds,
                ),
                self.fleet,
                self.config,
                flight,
                self.driver,
            )
            for plan in plans
        ]
        flight.begin(runs, cold, ahead)

    def _admit(
        self,
        flight: Flight,
        order: planning.Order,
        tasks: Sequence[PlannedTask],
        promised: float | None,
        *,
        cold: bool,
        solo: float | None = None,
    ) -> None:
        """Takes the request in, or raises Overloaded; its deadline runs from its arrival."""
        left = None if promised is None else flight.since + promised - self._now()
        if self.driver is not None:
            left = None  # the policy says who can be on time
        try:
            admit(
                tasks,
                self.fleet,
                solo=solo,
                remaining=left,
                in_flight=self._in_flight - flight.admitted,
                images=order.images,
                cold=cold,
                limits=self.config.admission,
            )
        except Overloaded as error:
            self.measures.shed(order.workflow.name, error, [*tasks] * order.images)
            raise
        if not flight.admitted:
            flight.admitted = order.images
            self._in_flight += order.images
        if flight.request.HasField("deadline_ms"):
            milliseconds = flight.request.deadline_ms
            left = flight.since + milliseconds / 1000 - self._now()
            flight.end_at(
                left,
                DeadlineExceeded(
                    f"not done within {milliseconds} ms; send a longer deadline_ms, or fewer steps",
                    field="deadline_ms",
                ),
            )

    def _shed(self, run: ImageRun, error: Overloaded) -> None:
        workflow = run.plan.tasks[0].template.workflow
        self.measures.shed(workflow, error, run.plan.tasks)

    def _ended(self, flight: Flight) -> None:
        self.flights.discard(flight)
        if (models := self._outdated.pop(flight, None)) is not None:
            self._needed -= Counter(models)
            self.fleet.need(frozenset(self._needed))
        flight.order = None  # and what was uploaded with it
        self._in_flight -= flight.admitted
        if flight.request.idempotency_key:
            self._results.ended(flight)
        if not self.flights and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _order(self, request: gateway_pb2.GenerateRequest) -> planning.Order:
        workflow = self.workflows.get(request.workflow)
        if workflow is None:
            self._check_synced()
            known = ", ".join(sorted(self.workflows)) or "none"
            raise NotFound(
                f"there is no workflow {request.workflow!r}; the gateway serves: {known}",
                field="workflow",
            )
        return planning.read_order(request, workflow, self.config.max_images)

    def _has_contents(self, order: planning.Order) -> bool:
        """Whether there is something that takes a worker to look at."""
        return self._hooks.checks_requests or bool(planning.uploads(order))

    async def _check_contents(self, order: planning.Order) -> None:
        uploads = planning.uploads(order)
        if uploads:
            await self._delivery.in_worker(lambda: planning.check_uploads(uploads))
        if self._hooks.checks_requests:
            await self._delivery.in_worker(lambda: self._hooks.check_request(order.request))

    # ------------------------------------------------------------ facts of models

    def _facts(self, order: planning.Order) -> Mapping[str, Facts]:
        """Of the models that were seen on a node, by role."""
        known = self.fleet.facts
        models = order.workflow.models
        return {role: known[ref.identity] for role, ref in models.items() if ref.identity in known}

    def _unseen(self, order: planning.Order) -> list[str]:
        """Roles that the request needs and whose model no node ever had."""
        known, models = self.fleet.facts, order.workflow.models
        return [r for r in planning.roles_needed(order) if models[r].identity not in known]

    def _missing_stages(self, order: planning.Order) -> list[tuple[str, str]]:
        """(model, stage) of what has no node: demand that brings models up from zero."""
        roles, models = planning.roles_needed(order), order.workflow.models
        missing = set(self.fleet.missing(models[role].identity for role in roles))
        stages = {
            (models[role].identity, stage)
            for role, stage in stages_of(order.workflow)
            if role in roles
        }
        return sorted(stage for stage in stages if stage[0] in missing)

    async def _facts_in_time(self, flight: Flight, order: planning.Order) -> Mapping[str, Facts]:
        """Waits for models to come up for the first time, which only they can tell the facts of."""
        found: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if found.done():
                return
            unseen = [order.workflow.models[role].identity for role in self._unseen(order)]
            if not unseen:
                found.set_result(None)
            elif (error := self.fleet.abandoned(order.workflow.name, unseen)) is not None:
                found.set_exception(error)

        flight.queued(cold=True, ahead=self._in_flight - flight.admitted)
        self.fleet.wait(look)
        try:
            seconds = order.workflow.slo.activation_timeout_seconds
            async with asyncio.timeout(seconds):
                await found
        except TimeoutError:
            raise self._never_came(order) from None
        finally:
            self.fleet.unwait(look)
        return self._facts(order)

    def _never_came(self, order: planning.Order) -> Unavailable:
        role = self._unseen(order)[0]
        why = self.fleet.why_missing(order.workflow.models[role].identity)
        seconds = order.workflow.slo.activation_timeout_seconds
        return Unavailable(
            f"no model node had {role} of workflow {order.workflow.name!r} ready within "
            f"{seconds:g} s" + (f" ({why})" if why else "") + "; check `kubediffusion status`",
            reason="NoReplica",
        )

    # ------------------------------------------------------------ what others ask

    def list_workflows(self) -> list[gateway_pb2.WorkflowInfo]:
        """Raises Unavailable while nobody knows them."""
        self._check_synced()
        return [describe_workflow(each, self.fleet) for each in self.workflows.values()]

    def _check_synced(self) -> None:
        if self.unsynced:
            raise Unavailable(self.unsynced, reason="NotSynced")

    def status(self) -> gateway_pb2.GetStatusResponse:
        return describe_gateway(
            self.config.gateway_id, self.fleet, self.flights, self._now() - self._since
        )

    def debug_counts(self) -> dict[str, int]:
        """What is held now, by kind; all zero when nothing is under way."""
        runs = [run for flight in self.flights for run in flight.runs]
        connections = list(self.fleet.connections.values())
        led = {} if self.driver is None else self.driver.counts()
        return {
            **led,
            "flights": len(self.flights),
            "images": self._in_flight,
            "runs": sum(not run.closed for run in runs),
            "attempts": sum(run.attempts_open for run in runs),
            "assigned": sum(connection.assigned for connection in connections),
            "waiting": self.fleet.waiting,
            "listeners": sum(flight.listeners for flight in self.flights),
            "background": sum(flight.background_tasks for flight in self.flights),
            "releases": sum(connection.pending_releases for connection in connections),
        }
