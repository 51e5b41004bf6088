# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One image over fake nodes that talk real gRPC: losing nodes, tensors and patience."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager

import pytest
from fake_nodes import FakeNode, declined, denoise_chain, digest, failed

from kubediffusion.errors import Internal, InvalidInput, KubeDiffusionError, Unavailable
from kubediffusion.gateway.config import GatewayConfig, RetryLimits
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.plan import ImagePlan, PlannedTask
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

STEPS = 12
EVERY = 4
CONFIG = GatewayConfig(
    checkpoint_every=EVERY, retries=RetryLimits(backoff_first=0.001, backoff_most=0.01)
)


def planned(name, model, stage, *, constants=(), ports=(), outputs=(), **more) -> PlannedTask:
    template = node_pb2.Assign(
        key=node_pb2.TaskKey(request_id="r1", task=name),
        model=model,
        stage=stage,
        inputs=dict(constants),
        outputs=outputs,
    )
    return PlannedTask(name, model, stage, template, dict(ports), **more)


def plan(*, activation_timeout: float = 20.0, previews: int = 0) -> ImagePlan:
    text = {"text": tensor_pb2.Value(text="a fox")}
    steps = {"steps": tensor_pb2.Value(integer=STEPS)}
    return ImagePlan(
        request_id="r1",
        index=0,
        seed=7,
        tasks=[
            planned("prompt", "text", "encode", constants=text, outputs=["embeds"]),
            planned(
                "denoise",
                "dit",
                "denoise",
                constants=steps,
                ports={"prompt.embeds": ("prompt", "embeds")},
                outputs=["latents"],
                steps=STEPS,
            ),
            planned(
                "decode",
                "vae",
                "decode",
                ports={"latents": ("denoise", "latents")},
                outputs=["image"],
            ),
        ],
        result=("decode", "image"),
        activation_timeout=activation_timeout,
        previews=previews,
    )


def expected_image() -> bytes:
    embeds = digest(b"text", tensor_pb2.Value(text="a fox").SerializeToString())
    steps = tensor_pb2.Value(integer=STEPS).SerializeToString()
    latents = denoise_chain(digest(b"prompt.embeds", embeds, b"steps", steps), STEPS)
    return (digest(digest(b"latents", latents)) * 6)[: 8 * 8 * 3]


class Outcome:
    """A RunListener that waits for the end."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.end: asyncio.Future = asyncio.get_running_loop().create_future()
        self.held_event = asyncio.Event()

    def started(self, run, stage, node):
        self.events.append(("started", stage, node))

    def stepped(self, run, step, total_steps):
        self.events.append(("stepped", step))

    def previewed(self, run, step, image):
        self.events.append(("preview", step))

    def resumed(self, run, task, reason):
        step = task.checkpoint.step if task.checkpoint is not None else 0
        self.events.append(("resumed", task.planned.stage, step, reason))

    def held(self, run, models):
        self.events.append(("held", *models))
        self.held_event.set()

    def completed(self, run, image):
        run.close()
        self.end.set_result(image.tensor)

    def failed(self, run, error):
        self.end.set_result(error)

    async def result(self, seconds: float = 20.0):
        return await asyncio.wait_for(asyncio.shield(self.end), seconds)

    def of(self, kind: str) -> list[tuple]:
        return [event for event in self.events if event[0] == kind]


@asynccontextmanager
async def fleet_of(nodes: Sequence[FakeNode], start: bool = True):
    fleet = Fleet("gw", CONFIG.nodes, time.monotonic, Profiles())
    if start:
        for node in nodes:
            await node.start()
    fleet.set_nodes([node.address for node in nodes])
    try:
        await up(fleet, len(nodes) if start else 0)
        yield fleet
    finally:
        await fleet.stop()
        for node in nodes:
            await node.stop()


async def up(fleet: Fleet, count: int) -> None:
    ready = asyncio.Event()

    def check() -> None:
        if len(fleet.states()) >= count:
            ready.set()

    fleet.wait(check)
    check()
    await asyncio.wait_for(ready.wait(), 60)
    fleet.unwait(check)


async def run_one(fleet: Fleet, image_plan: ImagePlan | None = None) -> tuple[ImageRun, Outcome]:
    outcome = Outcome()
    run = ImageRun(image_plan or plan(), fleet, CONFIG, outcome)
    run.start()
    await outcome.result()
    assert run.closed
    assert run.attempts_open == 0
    assert fleet.waiting == 0
    assert all(connection.assigned == 0 for connection in fleet.connections.values())
    return run, outcome


def assert_image(outcome: Outcome) -> None:
    result = outcome.end.result()
    assert not isinstance(result, KubeDiffusionError), result
    assert result.inline == expected_image()


def script_for(stage: str, step: int, answer, times: int = 1):
    """Answers once (or so often) at that step of that stage."""
    left = [times]

    def script(node, assign, at):
        if assign.stage == stage and at == step and left[0] > 0:
            left[0] -= 1
            return answer(assign) if callable(answer) else answer
        return None

    return script


async def test_runs_the_stages_in_order_and_releases_the_request(tmp_path):
    async with fleet_of([FakeNode(tmp_path, "a")]) as fleet:
        run, outcome = await run_one(fleet)
        assert_image(outcome)
        assert [event[1] for event in outcome.of("started")] == ["encode", "denoise", "decode"]
        assert [event[1] for event in outcome.of("stepped")] == list(range(1, STEPS + 1))
        assert [t.task for t in run.times()] == ["prompt", "denoise", "decode"]
        assert all(t.attempts == 1 and t.node == "a" for t in run.times())


async def test_release_reaches_every_node_that_took_part(tmp_path):
    nodes = [FakeNode(tmp_path, name, (name,)) for name in ("text", "dit", "vae")]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        for node in nodes:
            await node.until(lambda node=node: "r1" in node.released)


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("dies_at", [0, 1, 3, 4, 5, 8, 11, -2])
async def test_a_lost_denoiser_goes_on_elsewhere_from_its_checkpoint(
    tmp_path, dies_at, by_reference
):
    dying = script_for("denoise", dies_at, "die")
    first = FakeNode(tmp_path, "a", ("dit",), script=dying)
    second = FakeNode(tmp_path, "b", ("dit",))
    text = FakeNode(tmp_path, "c", ("text",), by_reference=by_reference)
    async with fleet_of([first, second, text, FakeNode(tmp_path, "d", ("vae",))]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        total = first.steps["r1"] + second.steps["r1"]
        assert total - STEPS <= EVERY
        assert [event[1] for event in outcome.of("resumed")] == ["denoise"]


async def test_a_node_of_another_fingerprint_starts_over(tmp_path):
    dying = script_for("denoise", 6, "die")
    first = FakeNode(tmp_path, "a", ("dit",), script=dying)
    second = FakeNode(tmp_path, "b", ("dit",), fingerprint="cpu-2")
    other = FakeNode(tmp_path, "c", ("text", "vae"))
    async with fleet_of([first, second, other]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert second.steps["r1"] == STEPS


async def test_outputs_that_went_with_their_node_are_made_again(tmp_path):
    """The text node dies when it is done, and the denoiser finds its input gone."""
    blocked = asyncio.Event()
    text = FakeNode(tmp_path, "a", ("text",), by_reference=True)
    spare = FakeNode(tmp_path, "b", ("text",), by_reference=True)

    def wait(node, assign, step):
        return blocked.wait() if step == -1 and not blocked.is_set() else None

    dit = FakeNode(tmp_path, "c", ("dit", "vae"), script=wait)
    async with fleet_of([text, spare, dit]) as fleet:
        outcome = Outcome()
        run = ImageRun(plan(), fleet, CONFIG, outcome)
        run.start()
        await dit.until(lambda: bool(dit.assigned))
        producer = text if text.assigned else spare
        await producer.stop()
        blocked.set()
        await outcome.result()
        assert_image(outcome)
        reasons = {event[3] for event in outcome.of("resumed")}
        assert "InputLost" in reasons
        assert len(text.assigned) + len(spare.assigned) == 2
        assert run.closed


@pytest.mark.parametrize(
    "reason",
    [
        node_pb2.DECLINE_REASON_DRAINING,
        node_pb2.DECLINE_REASON_NOT_RESIDENT,
        node_pb2.DECLINE_REASON_QUEUE_FULL,
        node_pb2.DECLINE_REASON_OUT_OF_MEMORY,
        node_pb2.DECLINE_REASON_OLD_EPOCH,
    ],
)
async def test_a_refused_task_goes_elsewhere(tmp_path, reason):
    refusing = script_for("denoise", -1, lambda assign: declined(assign, reason), times=99)
    nodes = [
        FakeNode(tmp_path, "a", ("dit",), script=refusing),
        FakeNode(tmp_path, "b", ("dit",)),
        FakeNode(tmp_path, "c", ("text", "vae")),
    ]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert nodes[1].steps["r1"] == STEPS


async def test_a_full_node_is_asked_again_later_if_there_is_no_other(tmp_path):
    full = script_for(
        "denoise",
        -1,
        lambda assign: declined(assign, node_pb2.DECLINE_REASON_QUEUE_FULL),
        times=2,
    )
    async with fleet_of([FakeNode(tmp_path, "a", script=full)]) as fleet:
        run, outcome = await run_one(fleet)
        assert_image(outcome)
        assert [t.attempts for t in run.times()] == [1, 1, 1]  # a refusal is no attempt


async def test_a_yielded_lease_goes_on_elsewhere_at_that_very_step(tmp_path):
    def give_back(node, assign, step):
        if assign.stage != "denoise" or step != 6:
            return None
        state = node.checkpoint(6, STEPS, node.state_at_6)
        return node_pb2.WorkEvent(yielded=node_pb2.Yielded(key=assign.key, checkpoint=state))

    first = FakeNode(tmp_path, "a", ("dit",), script=give_back)
    embeds = digest(b"text", tensor_pb2.Value(text="a fox").SerializeToString())
    steps = tensor_pb2.Value(integer=STEPS).SerializeToString()
    first.state_at_6 = denoise_chain(digest(b"prompt.embeds", embeds, b"steps", steps), 6)
    second = FakeNode(tmp_path, "b", ("dit",))
    async with fleet_of([first, second, FakeNode(tmp_path, "c", ("text", "vae"))]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert (first.steps["r1"], second.steps["r1"]) == (6, 6)


async def test_events_of_an_older_epoch_change_nothing(tmp_path):
    """A node that lost a lease speaks up later with a wrong result."""
    late: list[node_pb2.Assign] = []

    def lose_first(node, assign, step):
        if assign.stage == "denoise" and step == 5 and not late:
            late.append(assign)
            return failed(assign, node_pb2.FAILURE_REASON_INTERNAL, "hiccup")
        if assign.stage == "denoise" and step == 8 and late:
            wrong = tensor_pb2.TensorRef(shape=[1], nbytes=1, inline=b"x")
            done = node_pb2.Done(
                key=late[0].key, outputs={"latents": tensor_pb2.Value(tensor=wrong)}
            )
            node.send(done=done)
        return None

    async with fleet_of([FakeNode(tmp_path, "a", script=lose_first)]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)


async def test_invalid_input_fails_the_request_and_names_the_field(tmp_path):
    bad = script_for(
        "encode",
        -1,
        lambda assign: failed(
            assign, node_pb2.FAILURE_REASON_INVALID_INPUT, "too long", field="inputs.prompt"
        ),
    )
    node = FakeNode(tmp_path, "a", script=bad)
    async with fleet_of([node]) as fleet:
        _, outcome = await run_one(fleet)
        error = outcome.end.result()
        assert isinstance(error, InvalidInput)
        assert error.field == "inputs.prompt"
        assert len(node.assigned) == 1


async def test_a_task_that_fails_by_itself_is_given_up_soon(tmp_path):
    broken = script_for(
        "decode",
        -1,
        lambda assign: failed(assign, node_pb2.FAILURE_REASON_INTERNAL, "nan"),
        times=99,
    )
    nodes = [FakeNode(tmp_path, name, script=broken) for name in "ab"]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        assert isinstance(outcome.end.result(), Internal)
        assert "nan" in str(outcome.end.result())
        tries = [a for node in nodes for a in node.assigned if a.stage == "decode"]
        assert len(tries) == CONFIG.retries.internal_attempts
        assert sorted(a.key.epoch for a in tries) == [1, 2, 3]


async def test_a_helper_lost_every_time_is_given_up_after_all_attempts(tmp_path):
    broken = script_for(
        "denoise",
        0,
        lambda assign: failed(assign, node_pb2.FAILURE_REASON_HELPER_LOST, "gone"),
        times=99,
    )
    node = FakeNode(tmp_path, "a", script=broken)
    async with fleet_of([node]) as fleet:
        _, outcome = await run_one(fleet)
        error = outcome.end.result()
        assert isinstance(error, Unavailable)
        assert error.reason == "TaskLost"
        tries = [a for a in node.assigned if a.stage == "denoise"]
        assert len(tries) == CONFIG.retries.attempts


async def test_a_task_waits_for_a_node_and_runs_when_one_comes(tmp_path):
    late = FakeNode(tmp_path, "b", ("dit",))
    first = FakeNode(tmp_path, "a", ("text", "vae"))
    await first.start()
    async with fleet_of([first, late], start=False) as fleet:
        await up(fleet, 1)
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        await late.start()
        await outcome.result()
        assert_image(outcome)
        assert outcome.of("held") == [("held", "dit")]


async def test_a_model_that_becomes_resident_is_noticed(tmp_path):
    node = FakeNode(tmp_path, "a", ("text", "vae"))
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        node.models["dit"] = "dit"
        node.report()
        await outcome.result()
        assert_image(outcome)


async def test_no_node_in_time_is_an_error_that_names_the_model(tmp_path):
    async with fleet_of([FakeNode(tmp_path, "a", ("text", "vae"))]) as fleet:
        _, outcome = await run_one(fleet, plan(activation_timeout=0.05))
        error = outcome.end.result()
        assert isinstance(error, Unavailable)
        assert error.reason == "NoReplica"
        assert "dit" in str(error)


async def test_the_only_node_dies_and_comes_back(tmp_path):
    node = FakeNode(tmp_path, "a", script=script_for("denoise", 7, "die"))
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        await node.start()
        await outcome.result()
        assert_image(outcome)
        assert node.steps["r1"] - STEPS <= EVERY


async def test_closing_cancels_and_releases_on_the_nodes(tmp_path):
    never = asyncio.Event()

    def block(node, assign, step):
        return never.wait() if step == 3 else None

    node = FakeNode(tmp_path, "a", script=block)
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        run = ImageRun(plan(), fleet, CONFIG, outcome)
        run.start()
        await node.until(lambda: node.steps["r1"] == 3 or bool(node.steps))
        run.close()
        await node.until(lambda: "r1" in node.released)
        assert node.cancelled == ["r1"]
        assert run.attempts_open == 0
        assert all(connection.assigned == 0 for connection in fleet.connections.values())
        assert not outcome.end.done()


async def test_previews_are_spread_over_the_steps(tmp_path):
    async with fleet_of([FakeNode(tmp_path, "a")]) as fleet:
        _, outcome = await run_one(fleet, plan(previews=3))
        assert [event[1] for event in outcome.of("preview")] == [3, 6, 9]


async def test_a_node_taken_off_the_list_ends_what_it_has_and_gets_nothing_new(tmp_path):
    reached, go = asyncio.Event(), asyncio.Event()

    def block(node, assign, step):
        if assign.stage == "denoise" and step == 2:
            reached.set()
            return go.wait()
        return None

    first = FakeNode(tmp_path, "a", ("dit",), script=block)
    other = FakeNode(tmp_path, "b", ("text", "vae"))
    async with fleet_of([first, other]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(reached.wait(), 60)
        fleet.set_nodes([other.address])
        go.set()
        await outcome.result()
        assert_image(outcome)
        assert first.steps["r1"] == STEPS
        assert fleet.missing(["dit"]) == ("dit",)


async def test_the_speed_of_pulled_inputs_is_learnt(tmp_path):
    """32 bytes of embeddings from the text node to the denoiser in 4 seconds: 8 a second."""
    text = FakeNode(tmp_path, "a", ("text",), by_reference=True)
    dit = FakeNode(tmp_path, "b", ("dit", "vae"))
    dit.fetch_seconds = 4.0
    async with fleet_of([text, dit]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await outcome.result()
        assert fleet.profiles.transfer_seconds(same_host=True, nbytes=80) == pytest.approx(10.0)
