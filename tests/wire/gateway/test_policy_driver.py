# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The driver over nodes that exist only as tables: whatever happens, no task is lost or doubled."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from one_image import plan

from kubediffusion.errors import KubeDiffusionError
from kubediffusion.gateway.attempts import TaskStatus
from kubediffusion.gateway.config import GatewayConfig, RetryLimits
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.gateway.driver import PAUSE, PolicyDriver
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

STEPS = 12
CONFIG = GatewayConfig(
    policy="kubediffusion",
    retries=RetryLimits(attempts=6, internal_attempts=4, backoff_first=0.0, backoff_most=0.0),
)
MODELS = ("text", "dit", "vae")
SECONDS = {"encode": 0.05, "denoise": 2.0, "decode": 0.1}


class TableNode:
    """A NodeConnection without a connection; what it was sent lies in `tasks`."""

    host_id = node_id = "host"
    description = None
    leaving = False
    expected_seconds = reported_at = 0.0

    def __init__(self, name: str, world: World) -> None:
        self.address = name
        self.fingerprint = "cpu-2" if name == "c" else "cpu-1"
        self.world = world
        self.incarnation = f"{name}-1"
        self.ready = frozenset(MODELS)
        self.up = True
        self.draining = False
        self.load = node_pb2.LoadReport(gateways=1)
        self.tasks: dict[tuple[str, str], object] = {}
        self.asked: set[tuple[str, str]] = set()

    @property
    def assigned(self) -> int:
        return len(self.tasks)

    @property
    def state(self) -> NodeState | None:
        if not self.up:
            return None
        return NodeState(
            self.address, self.node_id, self.incarnation, self.host_id, self.fingerprint,
            self.ready, draining=self.draining,
        )  # fmt: skip

    def assign(self, attempt, message, serial) -> None:
        key = (attempt.request_id, attempt.task_name)
        assert self.up, "sent to a node that is down"
        assert message.assign.model in self.ready, "sent to a node without the model"
        resume = message.assign.lease.resume
        assert resume.fingerprint in ("", self.fingerprint), "would give other bits"
        holders = [node.address for node in self.world.nodes if key in node.tasks]
        assert not holders, f"{key} is on {holders} already"
        self.tasks[key] = attempt

    def forget(self, attempt) -> None:
        key = (attempt.request_id, attempt.task_name)
        if self.tasks.get(key) is attempt:
            del self.tasks[key]
        self.asked.discard(key)

    def yield_lease(self, attempt) -> None:
        self.asked.add((attempt.request_id, attempt.task_name))

    def cancel(self, request_id) -> None:
        pass

    def release(self, request_id) -> None:
        pass

    def declined(self, model, reason) -> None:
        if reason == node_pb2.DECLINE_REASON_NOT_RESIDENT:
            self.ready -= {model}


class Listener:
    def __init__(self) -> None:
        self.result: object = None

    def completed(self, run, image) -> None:
        assert self.result is None
        self.result = image
        run.close()

    def failed(self, run, error) -> None:
        assert self.result is None
        self.result = error

    def __getattr__(self, name):
        return lambda *_: None


class World:
    """Three nodes, a clock, and everything that may happen to them."""

    def __init__(self, spread: bool) -> None:
        self.now = 100.0
        self.nodes: list[TableNode] = [TableNode(name, self) for name in "abc"]
        if spread:
            for node, models in zip(self.nodes, ({"text"}, {"dit"}, {"dit", "vae"}), strict=True):
                node.ready = frozenset(models)
        self.had = [node.ready for node in self.nodes]
        self.fleet = Fleet("gw", CONFIG.nodes, lambda: self.now, Profiles())
        self.fleet.connections = {node.address: node for node in self.nodes}  # type: ignore
        self.shed = 0
        self.driver = PolicyDriver("kubediffusion", self.fleet, lambda: self.now, self._on_shed)
        self.policy = self.driver.policy
        self.runs: list[tuple[ImageRun, Listener]] = []
        for model, (stage, seconds) in zip(MODELS, SECONDS.items(), strict=True):
            self.fleet.profiles.observe_run(model, stage, "cpu-1", 1.0, seconds)
        self.fleet.changed()

    def _on_shed(self, run, error) -> None:
        self.shed += 1

    # ---------------------------------------------------------------- what may happen

    def arrive(self, which: int) -> None:
        number = len(self.runs)
        deadline = (None, 3.0, 6.0, 30.0)[which % 4]
        image = plan(activation_timeout=1e6)
        tasks = [replace(task, template=_named(task.template, number)) for task in image.tasks]
        listener = Listener()
        run = ImageRun(
            replace(
                image,
                request_id=f"r{number}",
                tasks=tasks,
                deadline=None if deadline is None else self.now + deadline,
                strict=which % 2 == 1,
            ),
            self.fleet,
            CONFIG,
            listener,
            self.driver,
        )
        self.runs.append((run, listener))
        run.start()

    def _some_task(self, which: int):
        tasks = [(node, attempt) for node in self.nodes for attempt in node.tasks.values()]
        return tasks[which % len(tasks)] if tasks else (None, None)

    def finish(self, which: int) -> None:
        _, attempt = self._some_task(which)
        if attempt is not None:
            planned = attempt.task.planned
            value = tensor_pb2.Value(tensor=tensor_pb2.TensorRef(inline=b"x"))
            outputs = dict.fromkeys(planned.template.outputs, value)
            seconds = SECONDS[planned.stage]
            timing = node_pb2.Timing(run_seconds=seconds, steps_run=planned.steps)
            attempt.handle("done", node_pb2.Done(outputs=outputs, timing=timing))

    def _checkpoint(self, attempt, step: int) -> node_pb2.Checkpoint:
        before = attempt.task.checkpoint.step if attempt.task.checkpoint is not None else 0
        tensors = {"latents": tensor_pb2.TensorRef(inline=b"x")}
        return node_pb2.Checkpoint(
            step=min(STEPS, before + step % 4), total_steps=STEPS, tensors=tensors,
            fingerprint=attempt.node.fingerprint,
        )  # fmt: skip

    def checkpoint(self, which: int) -> None:
        _, attempt = self._some_task(which)
        if attempt is not None and attempt.task.planned.steps:
            taken = node_pb2.CheckpointTaken(checkpoint=self._checkpoint(attempt, which))
            attempt.handle("checkpoint", taken)

    def give_back(self, which: int) -> None:
        """As asked, or because the node evicts its model."""
        node, attempt = self._some_task(which)
        if node is not None and attempt.task.planned.steps:
            attempt.handle("yielded", node_pb2.Yielded(checkpoint=self._checkpoint(attempt, which)))

    def decline(self, which: int) -> None:
        _, attempt = self._some_task(which)
        if attempt is not None:
            reasons = (
                node_pb2.DECLINE_REASON_DRAINING,
                node_pb2.DECLINE_REASON_NOT_RESIDENT,
                node_pb2.DECLINE_REASON_QUEUE_FULL,
                node_pb2.DECLINE_REASON_FINGERPRINT,
            )
            attempt.node.draining = attempt.node.draining or which % 4 == 0
            attempt.handle("declined", node_pb2.Declined(reason=reasons[which % 4]))

    def fail(self, which: int) -> None:
        _, attempt = self._some_task(which)
        if attempt is not None:
            reason = node_pb2.FAILURE_REASON_INTERNAL
            attempt.handle("failed", node_pb2.Failed(reason=reason, message="nan"))

    def kill(self, which: int) -> None:
        node = self.nodes[which % 3]
        node.up = False
        lost, node.tasks = list(node.tasks.values()), {}
        for attempt in lost:
            attempt.lost("gone")
        self.fleet.changed()

    def mend(self, which: int) -> None:
        node = self.nodes[which % 3]
        node.up, node.draining, node.ready = True, False, self.had[which % 3]
        self.fleet.changed()

    def evict(self, which: int) -> None:
        node = self.nodes[which % 3]
        node.ready -= {MODELS[which // 3 % 3]}
        self.fleet.changed()

    def leave(self, which: int) -> None:
        if self.runs:
            self.runs[which % len(self.runs)][0].close()

    def wait(self, which: int) -> None:
        self.now += (0.01, 0.3, PAUSE, 5.0)[which % 4]

    # ---------------------------------------------------------------- what must hold

    async def settle(self) -> None:
        for _ in range(3):  # back-offs of no time, and what they call for
            await asyncio.sleep(0)
            self.driver._timed()

    def check(self) -> None:
        assert self.driver.policy is self.policy, "a round failed"
        sent = {key for node in self.nodes for key in node.tasks}
        for run, listener in self.runs:
            here = {name for request, name in sent if request == run.request_id}
            if run.closed:
                assert not here, "a closed run has tasks on nodes"
                continue
            assert listener.result is None
            open_tasks = {name for name, task in run.tasks.items() if task.attempt is not None}
            assert here == open_tasks
            led = self.driver._led[run]
            assert (led.work is not None) <= led.on_node, "a work without a task on its node"
            waits = {task.status for task in run.tasks.values()} & {
                TaskStatus.TURN,
                TaskStatus.HELD,
                TaskStatus.BACKOFF,
            }
            assert here or waits, "forgotten"
            if run.awaits_turn and led.job is None:
                assert led in self.driver._paused, "awaits a turn that nobody gives"
        counts = self.driver.counts()
        assert counts["led"] == sum(not run.closed for run, _ in self.runs)
        works = [led.work for led in self.driver._led.values() if led.work is not None]
        assert len({work.node for work in works}) == len(works), "two works on one node"


def _named(template: node_pb2.Assign, number: int) -> node_pb2.Assign:
    named = node_pb2.Assign()
    named.CopyFrom(template)
    named.key.request_id = f"r{number}"
    named.priority = int(number % 5 == 4)
    return named


HAPPENINGS = (
    World.arrive, World.arrive, World.finish, World.finish, World.finish, World.checkpoint,
    World.give_back, World.decline, World.fail, World.kill, World.mend, World.mend, World.evict,
    World.leave, World.wait,
)  # fmt: skip
happenings = st.lists(
    st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 1000)), min_size=5, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(happenings=happenings, spread=st.booleans())
def test_whatever_happens_no_task_is_lost_and_none_is_sent_twice(happenings, spread):
    asyncio.run(_live(happenings, spread))


async def _live(happenings, spread: bool) -> None:
    world = World(spread)
    for happen, which in happenings:
        happen(world, which)
        await world.settle()
        world.check()
    # In the end all nodes work, and everybody comes to an end.
    for place in range(3):
        world.mend(place)
    for _ in range(20 * len(world.runs) + 20):
        world.finish(0)
        world.wait(2)
        await world.settle()
        world.check()
        if all(run.closed for run, _ in world.runs):
            break
    for run, listener in world.runs:
        assert run.closed, [task.status for task in run.tasks.values()]
        assert listener.result is None or isinstance(
            listener.result, KubeDiffusionError | tensor_pb2.Value
        )
    assert not any(world.driver.counts().values())
    assert not any(node.tasks for node in world.nodes)
    assert world.fleet.waiting == 0
    world.driver.stop()
