# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Drives a scheduling policy over live nodes: its records kept true, its actions carried out.

The policy thinks in requests and works (`scheduling.policy`), the wire in tasks (`coordinator`).
In between stands a `Led` for each image, and two rules that keep both sides of it equal:

* A work exists only while a task of it is on its node. When none is any more, whatever the reason
  (done, given back, lost, cancelled), the work ends with what was really done.
* A request is the policy's only while a task of it awaits its turn, or a work of it exists. Where
  the policy's idea of what is left is not the truth (an output or a checkpoint was lost), the
  request is withdrawn and comes again as it is.

So nothing here depends on the order of events: they only say who is to be looked at. All that
happened in a turn of the loop is looked at together, in one round, and the policy decides once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubediffusion.errors import Internal, Overloaded
from kubediffusion.gateway.attempts import Attempt, TaskRun
from kubediffusion.gateway.connections import NodeConnection
from kubediffusion.gateway.dispatch import placement_task
from kubediffusion.gateway.helpers import NONE, Helpers
from kubediffusion.gateway.led import Led
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.placing import TURN, Turn
from kubediffusion.gateway.records import Records
from kubediffusion.gateway.taken import Taken
from kubediffusion.scheduling.admission import ShedReason, bounded
from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.placement import Placement, place
from kubediffusion.scheduling.policies.live import live_policy
from kubediffusion.scheduling.policy import Action, Finish, Revoke, Shed, Start, Work
from kubediffusion.scheduling.translation import Image, Lead, Translator
from kubediffusion.v1alpha1 import gateway_pb2

if TYPE_CHECKING:
    from kubediffusion.gateway.coordinator import ImageRun

# Who promised nothing is as urgent as if it had promised this, in seconds and times its work; it is
# never shed for good, and asked for again after a pause.
SOFT_SECONDS = 60.0
SOFT_SCALE = 20.0
PAUSE = 1.0
# While something waits the policy is asked so often at least: a node that was silent speaks again
# without a change of the fleet, and others' work ends without a word to us.
LOOK = 1.0
LOOK_SHARED = 0.1
# A round looks and decides so often at most, as its own actions call for.
PASSES = 8
# Times that moved by this share are told to the policy, at most so often; new ones at once.
DRIFT = 0.05
TEACH = 0.5

log = logging.getLogger(__name__)


class PolicyDriver:
    """A `Placing`. On the gateway's event loop alone; use `stop` at the end."""

    def __init__(
        self,
        name: str,
        fleet: Fleet,
        now: Callable[[], float],
        on_shed: Callable[[ImageRun, Overloaded], None],
    ) -> None:
        """Raises InvalidInput where `name` is not of a live policy."""
        self._name = name
        self._fleet = fleet
        self._now = now
        self._on_shed = on_shed
        self._taken = Taken(fleet.profiles)
        self._translator = Translator(self._taken.seconds)
        self.records = Records(fleet, self._translator)
        self.policy = live_policy(name, self.records.nodes)
        self._led: dict[ImageRun, Led] = {}
        self._jobs: dict[int, Led] = {}
        self._touched: dict[ImageRun, None] = {}
        self._paused: set[Led] = set()
        self._costs = Costs({})
        self._learning = False
        self._taught = 0.0
        self._moved = self._shared = False
        self._serial = 0
        self._rounding = False
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._stopped = False
        fleet.watch(self._fleet_changed)

    def stop(self) -> None:
        self._stopped = True
        for handle in (self._soon, self._later):
            if handle is not None:
                handle.cancel()
        for held in (self._led, self._jobs, self._touched, self._paused):
            held.clear()

    def forget_models(self, keep: frozenset[str]) -> None:
        self._taken.forget_models(keep)

    def known(self) -> tuple[Costs, list[Pipeline]]:
        """All times and pipelines as the policy has them from now on: what a simulator of this
        fleet needs beside `records`."""
        self._teach(self._now())
        return self._costs, self._translator.pipelines

    def counts(self) -> dict[str, int]:
        """What is held here; zero of all when nothing is under way."""
        return {
            "led": len(self._led),
            "jobs": len(self._jobs),
            "works": sum(led.work is not None for led in self._led.values()),
        }

    # ---------------------------------------------------------------- what a run asks and tells

    def place(self, run: ImageRun, task: TaskRun) -> Placement | Turn | None:
        led = self._led.get(run)
        if led is None:
            led = self._led[run] = Led(run, self._now())
        if led.image is None:
            return self._by_queue(run, task)
        if led.job is None:
            led.lead = self._lead_of(led, led.image)
        part = led.parts[task.planned.name]
        if led.lead is None or part not in led.lead.parts:
            return self._by_queue(run, task)
        if led.work is None or led.revoked or part not in led.covers:
            return TURN
        return self._on_node(led, task) or TURN

    def _lead_of(self, led: Led, image: Image) -> Lead | None:
        """On the nodes of now; those where it failed, or could not go on from its checkpoint, are
        of no use to it while there are others."""
        avoided, checkpoint = led.failed_on, led.checkpoint
        if checkpoint is not None:
            avoided |= self.records.others(checkpoint.fingerprint)
        return self._translator.lead(image, avoided)

    def _by_queue(self, run: ImageRun, task: TaskRun) -> Placement | None:
        return self._fleet.place(placement_task(task, run.tasks))

    def _on_node(self, led: Led, task: TaskRun) -> Placement | None:
        """On the work's node, where that can take it and has not failed it meanwhile."""
        address = led.address
        if address in task.failed_on and address not in led.failed_before:
            return None
        connection = self._fleet.connections.get(address)
        state = None if connection is None else connection.state
        if state is None:
            return None
        found = place(
            placement_task(task, led.run.tasks), [state], self._fleet.profiles, self._now()
        )
        return found if found is not None and found.ready else None

    def helpers(self, task: TaskRun, node: NodeConnection) -> Helpers:
        """None: the policy counts on every idle node for a request of its own."""
        return NONE

    def touched(self, run: ImageRun) -> None:
        led = self._led.get(run)
        if led is None:
            return
        self._touched[run] = None
        if run.closed and not self._rounding:
            self._close(led, self._now())
        self._wake()

    def _close(self, led: Led, now: float) -> None:
        """At once: nothing of a request that is over is held."""
        del self._touched[led.run]
        try:
            self._settle(led, now)
        except Exception:
            self._led.pop(led.run, None)
            self._begin_anew(now)

    def ran(self, attempt: Attempt, time: gateway_pb2.StageTime) -> None:
        self._taken.observe(attempt, time)
        self._learning = True

    # ---------------------------------------------------------------- a round

    def _fleet_changed(self) -> None:
        # At once: whoever waits for a node is asked next, and finds who leads it.
        self._moved = self.records.refresh(self._now()) or self._moved
        self._wake()

    def _wake(self) -> None:
        if self._soon is None and not self._rounding and not self._stopped:
            self._soon = asyncio.get_running_loop().call_soon(self.round)

    def round(self) -> None:
        """Looks at whom something happened to, and lets the policy decide."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._stopped:
            return
        self._rounding = True
        now = self._now()
        try:
            for _ in range(PASSES):
                self._look(now)
                for action in self.policy.decide(now):
                    self._act(action, now)
                if not self._touched:
                    break
        except Exception:
            self._begin_anew(now)
        finally:
            self._rounding = False
            self._arm(now)

    def _begin_anew(self, now: float) -> None:
        """An exception takes no request with it: another policy starts from what is true. What runs
        runs on, beside what the new one sends, and what comes of it is the new one's."""
        log.exception("policy %s failed; another one takes its place", self._name)
        self.policy = live_policy(self._name, self.records.nodes)
        self._shared = False
        self.records.busy.clear()
        self._jobs.clear()
        for led in self._led.values():
            led.job = led.work = None
        self._touched.update(dict.fromkeys(self._led))
        self._teach(now)

    def _look(self, now: float) -> None:
        moved, self._moved = self.records.refresh(now) or self._moved, False
        if self.records.shared != self._shared:
            self._shared = self.records.shared
            self.policy.shares(self._shared, now)
        if moved:
            self.policy.fleet_changed(now)
            self._touched.update(dict.fromkeys(self._led))
        if self._learning:
            drift = self._translator.drift()
            due = drift == math.inf or (drift > DRIFT and now >= self._taught + TEACH)
            if due:
                self._teach(now)
            self._learning = drift > DRIFT and not due
        while self._touched:
            run = next(iter(self._touched))
            del self._touched[run]
            self._settle(self._led[run], now)

    def _settle(self, led: Led, now: float) -> None:
        """Makes the policy's side of a request what its tasks say. See the module."""
        run = led.run
        if led.work is not None:
            if led.on_node and not run.closed:
                return
            self._end_work(led, led.work, now)
        if run.closed:
            self._withdraw(led, now)
            self._paused.discard(led)
            del self._led[run]
            return
        if not run.awaits_turn or self._led_otherwise(led):
            self._withdraw(led, now)
        if run.awaits_turn and led.job is None and now >= led.not_before:
            self._arrive(led, now)

    def _led_otherwise(self, led: Led) -> bool:
        """Whether the nodes of now ask for another pipeline than the policy has, or for none."""
        if led.image is None or led.job is None:
            return False
        return self._lead_of(led, led.image) != led.lead

    def _arrive(self, led: Led, now: float) -> None:
        assert led.image is not None, "what is not led awaits no turn"
        led.lead = self._lead_of(led, led.image)
        if led.lead is None or not led.waiting <= led.lead.parts:
            led.run.take_turn()  # by the queues, or held until there is a node
            if led.lead is None or not led.run.awaits_turn:
                return
        if self._translator.stale:
            self._teach(now)
        self._serial += 1
        job = led.job = self._job(led, now)
        self._jobs[job.id] = led
        self.policy.arrived(job, now)

    def _job(self, led: Led, now: float) -> Job:
        plan, lead, image = led.run.plan, led.lead, led.image
        assert lead is not None, "it is about to be led"
        assert image is not None, "it is about to be led"
        encoded, steps = led.believed = led.truth()
        seconds = self._translator.seconds
        left = seconds(lead, encode=not encoded, steps=steps)
        solo = seconds(lead, encode=True, steps=lead.pipeline.steps)
        template = plan.tasks[0].template
        led.soft = led.late or plan.deadline is None or not self._translator.measured(image)
        if led.soft or plan.deadline is None:
            promised = led.since + max(SOFT_SECONDS, SOFT_SCALE * solo)
            deadline = max(promised, now + 2 * left + PAUSE)
        else:
            deadline = plan.deadline - self._translator.apart_seconds(image, lead)
        return Job(
            self._serial,
            lead.pipeline,
            led.since,
            deadline,
            solo,
            template.tenant,
            template.weight or 1.0,
            template.priority,
            encoded,
            steps,
        )

    def _end_work(self, led: Led, work: Work, now: float) -> None:
        led.work = None
        self.records.busy.discard(work.node)
        work.done = led.done_of(work)
        work.ended = True
        if self.records.nodes[work.node].up:
            self.policy.ended(work, now)
        else:
            self.policy.lost(work, now)
        if led.believed != led.truth():
            self._withdraw(led, now)

    def _withdraw(self, led: Led, now: float) -> None:
        if led.job is not None:
            del self._jobs[led.job.id]
            self.policy.withdrawn(led.job, now)
            led.job = None

    def _teach(self, now: float) -> None:
        needed = {led.job.pipeline.name for led in self._jobs.values() if led.job is not None}
        needed |= {led.lead.pipeline.name for led in self._led.values() if led.lead is not None}
        self._costs = self._translator.tell(needed)
        self._taught = now
        self.records.show()
        self.policy.learnt(self._costs, self._translator.pipelines, now)

    # ---------------------------------------------------------------- actions

    def _act(self, action: Action, now: float) -> None:
        if isinstance(action, Start):
            self._start(action.work)
        elif isinstance(action, Revoke):
            led = self._jobs.get(action.work.jobs[0].id)
            if led is not None and led.work is action.work:
                led.revoke()
        elif isinstance(action, Shed):
            led = self._jobs.pop(action.job.id, None)
            if led is not None:
                self._shed(led, action.job, now)
        elif isinstance(action, Finish):
            led = self._jobs.pop(action.job.id, None)
            if led is not None:
                led.job = None
                if led.run.awaits_turn:
                    self.touched(led.run)  # something of it was lost, and is to be done again
        else:
            log.error("a policy without a plan asks to load %s", action.model)

    def _start(self, work: Work) -> None:
        if len(work.jobs) != 1 or work.helpers:
            # `live_parameters` has batches and splits off: a policy that starts one is broken.
            raise Internal("a policy started a work that is not one lease on one node")
        led = self._jobs[work.jobs[0].id]
        led.begin(work, self.records.addresses[work.node])
        self.records.busy.add(work.node)
        led.run.take_turn()
        if not led.on_node:
            self.touched(led.run)  # nothing of it could be sent: it ends at once

    def _shed(self, led: Led, job: Job, now: float) -> None:
        """One whose client set no deadline of its own goes on being tried once it has begun."""
        led.job = None
        if led.soft or (led.begun and not led.run.plan.strict):
            led.late = True
            led.not_before = now + PAUSE
            self._paused.add(led)
            return
        assert led.lead is not None, "the policy had it"
        encoded, steps = led.truth()
        left = self._translator.seconds(led.lead, encode=not encoded, steps=steps)
        wait = bounded(self._backlog() + left - (job.deadline - now))
        error = Overloaded(
            f"{left:.2f} s of work are left, and {max(0.0, job.deadline - now):.2f} s to do it in "
            f"beside what is more urgent; try again in {wait:.1f} s",
            retry_after=wait,
            reason=ShedReason.DEADLINE_INFEASIBLE.value,
        )
        self._on_shed(led.run, error)
        led.run.shed(error)

    def _backlog(self) -> float:
        """Seconds of what is left of all requests, shared by the nodes that are up."""
        left = 0.0
        for led in self._jobs.values():
            if led.lead is not None:
                encoded, steps = led.believed
                left += self._translator.seconds(led.lead, encode=not encoded, steps=steps)
        return left / max(1, sum(node.up for node in self.records.nodes))

    # ---------------------------------------------------------------- timers

    def _arm(self, now: float) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        moments = [self.policy.wake_at(now) or math.inf]
        if any(led.work is None for led in self._jobs.values()):
            moments.append(now + (LOOK_SHARED if self._shared else LOOK))
        moments += [led.not_before for led in self._paused]
        if self._touched:  # the passes did not suffice: somebody sends what somebody refuses
            moments.append(now + LOOK_SHARED)
        first = min(moments)
        if first < math.inf and not self._stopped:
            loop = asyncio.get_running_loop()
            self._later = loop.call_later(max(0.0, first - self._now()), self._timed)

    def _timed(self) -> None:
        self._later = None
        now = self._now()
        for led in [led for led in self._paused if led.not_before <= now]:
            self._paused.discard(led)
            self._touched[led.run] = None
        self.round()
