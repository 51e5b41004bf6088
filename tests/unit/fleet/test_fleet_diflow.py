# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiFlow's policy, held to schedules that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleet_cases import CONTROLLED, COSTS, GB, SMALL, job

from kubediffusion.scheduling.policies.diflow import (
    DiFlow,
    Tables,
    may_group,
    next_power_of_two,
    overloaded,
    workers_needed,
)
from kubediffusion.scheduling.policies.diflow_graph import unroll
from kubediffusion.scheduling.policy import Finish, Node, Shed, Start
from kubediffusion.simulate.engine import Simulation
from kubediffusion.simulate.fleet import records
from kubediffusion.simulate.machines import Machine
from kubediffusion.simulate.outcome import Options

TABLES = Tables({"small": (1, 2), "text": (2, 4)}, early_abort=False)
HELD = {name: costs.nbytes for name, costs in COSTS.models.items() if costs.nbytes}


def nodes(count: int, hosts: int = 1, held=HELD) -> list[Node]:
    return [Node(i, i * hosts // count, 40 * GB, dict(held)) for i in range(count)]


def started(policy: DiFlow, now: float = 0.0) -> list[tuple[str, int, int]]:
    """(model, batch, node) of what a round starts."""
    return [
        (a.work.calls[0].model, a.work.calls[0].batch, a.work.node)
        for a in policy.decide(now)
        if isinstance(a, Start)
    ]


def test_a_request_unrolls_to_a_task_for_every_forward():
    ops = unroll(CONTROLLED)
    by_model = {m: sum(op.model == m for op in ops) for m in CONTROLLED.models}
    assert by_model == {"text": 2, "small": 20, "small-control": 20, "vae": 1}
    assert sum(op.pinned for op in ops) == 11  # to begin with, and one a step
    assert ops[-1].depth == 1
    first = next(op for op in ops if op.model == "small")
    control = next(op for op in ops if op.model == "small-control")
    # By the shortest way: each sampler feeds the next one, ten of them and the decoder follow.
    assert first.depth == 12
    assert control.depth == first.depth + 1
    assert first.lazy == [control.index]


def test_the_head_of_the_list_is_the_oldest_and_there_the_farthest_from_the_sink():
    policy = DiFlow(nodes(1), COSTS, [SMALL], TABLES)
    policy.arrived(job(0, SMALL, 0.0), 0.0)
    policy.arrived(job(1, SMALL, 1.0), 1.0)
    # Latents go through all eleven samplers to the decoder, depth 13; an encoder also feeds the
    # last denoiser, depth 4.
    assert started(policy, 1.0) == [("latents", 1, 0), ("text", 4, 0)]


def test_a_worker_is_available_for_ten_milliseconds_of_work():
    """The latents take 1 ms, so the encoders follow at once; they take 19, so no more does."""
    policy = DiFlow(nodes(1), COSTS, [SMALL], TABLES)
    policy.arrived(job(0, SMALL, 0.0), 0.0)
    assert started(policy) == [("latents", 1, 0), ("text", 2, 0)]
    policy.arrived(job(1, SMALL, 0.0), 0.0)
    assert started(policy) == []


def test_with_room_for_all_batches_are_of_the_latency_table_else_of_the_throughput_table():
    for workers, batch in ((4, 2), (1, 4)):
        policy = DiFlow(nodes(workers), COSTS, [SMALL], TABLES)
        for number in range(2):
            policy.arrived(job(number, SMALL, 0.0), 0.0)
        batches = [b for model, b, _ in started(policy) if model == "text"]
        assert batches[0] == batch
    assert workers_needed({"text": 3, "small": 2, "vae": 1}, TABLES) == 2 + 2 + 1


def test_the_worker_with_the_least_queue_transfer_load_and_run_is_taken():
    """Worker 0 lacks the model (load 1 s), 1 has 5 ms queued, 2 nothing: 2; of equals the first."""
    fleet = nodes(3)
    del fleet[0].resident["text"]
    policy = DiFlow(fleet, COSTS, [SMALL], TABLES)
    policy._reserved[1] = 0.005
    policy.arrived(job(0, SMALL, 0.0), 0.0)
    placed = {model: node for model, _, node in started(policy)}
    assert placed["text"] == 2
    assert placed["latents"] == 0


def test_a_nearer_copy_is_pulled_rather_than_the_first():
    """An output on workers 0 (other host) and 3 (same host): worker 2 pays the same-host time."""
    fleet = nodes(4, hosts=2)
    policy = DiFlow(fleet, COSTS, [SMALL], TABLES)
    policy.arrived(job(0, SMALL, 0.0), 0.0)
    run = policy._runs[0]
    denoiser = next(task for task in run.tasks if task.op.model == "small")
    for index, _ in denoiser.op.inputs:
        run.tasks[index].at = [0, 3]
    count = len(denoiser.op.inputs)
    assert policy._transfer(policy._inputs([denoiser]), 2) == pytest.approx(count * 1e-3)
    assert policy._transfer(policy._inputs([denoiser]), 1) == pytest.approx(count * 1e-3)
    assert policy._transfer(policy._inputs([denoiser]), 3) == 0.0


def test_tasks_with_deferred_inputs_never_share_a_batch():
    policy = DiFlow(nodes(1), COSTS, [SMALL, CONTROLLED], TABLES)
    for number, pipeline in enumerate((SMALL, SMALL, CONTROLLED)):
        policy.arrived(job(number, pipeline, 0.0), 0.0)
    plain, other, lazy = (
        next(task for task in policy._runs[i].tasks if task.op.model == "small") for i in range(3)
    )
    assert may_group(plain, other)
    assert not may_group(plain, lazy)
    assert not may_group(lazy, plain)


def test_run_times_are_those_of_the_next_power_of_two():
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]


def test_early_abort_refuses_what_the_work_in_flight_leaves_no_slack_for():
    assert not overloaded([9.0, 9.0], workers=3, slack=0.1)  # fewer requests than workers
    assert overloaded([1.0, 2.0, 3.0], workers=2, slack=2.9)  # max(6 / 2, 3) = 3
    assert not overloaded([1.0, 2.0, 3.0], workers=2, slack=3.0)
    tables = replace(TABLES, early_abort=True)
    policy = DiFlow(nodes(1), COSTS, [SMALL], tables)
    for number in range(4):
        policy.arrived(job(number, SMALL, 0.0, scale=1.5), 0.0)
    assert sum(isinstance(action, Shed) for action in policy.decide(0.0)) == 3


def run(pipeline, workers: int, count: int = 1):
    machines = [Machine(i, 0, 40 * GB) for i in range(workers)]
    for machine in machines:
        for name, nbytes in HELD.items():
            machine.put(name, nbytes)
    policy = DiFlow(records(machines), COSTS, PIPES, TABLES)
    jobs = [job(i, pipeline, 0.0) for i in range(count)]
    simulation = Simulation(machines, [policy], jobs, COSTS, Options(timeline=True))
    return simulation.run()


PIPES = [SMALL, CONTROLLED]


def test_on_two_workers_the_branches_run_side_by_side():
    """By hand: 21 ms of encoding (2 prompts, batch 2, 19 ms + 2), then ten times a denoiser on each
    worker (50 + 2 ms, and what it pulls) and a sampler (2.5 ms), then the decoder (100 + 2)."""
    outcome = run(SMALL, 2)
    denoising = [span for span in outcome.spans if span.what == "small"]
    assert len(denoising) == 20
    assert {span.node for span in denoising} == {0, 1}
    by_hand = 0.021 + 10 * (0.052 + 0.0025) + 0.102
    assert outcome.finished[0] == pytest.approx(by_hand, abs=0.02)


def test_on_one_worker_a_lone_request_runs_its_branches_one_after_the_other():
    """With the head taken, one ready task is left for one worker: latency mode, batch 1."""
    outcome = run(SMALL, 1)
    denoising = [span for span in outcome.spans if span.what == "small"]
    assert len(denoising) == 20
    by_hand = 0.003 + 0.0025 + 2 * 0.012 + 10 * (2 * 0.052 + 0.0025) + 0.102
    assert outcome.finished[0] == pytest.approx(by_hand, abs=0.01)


def test_on_one_worker_two_requests_are_batched_by_two():
    """A step has four tasks. With the first, three are left for one worker: throughput mode, and
    the first two go together. With the third, one is left: latency mode. So three calls a step."""
    outcome = run(SMALL, 1, count=2)
    denoising = [span for span in outcome.spans if span.what == "small"]
    assert max(len(span.jobs) for span in denoising) <= 2
    assert len(denoising) == 30


def test_a_denoiser_starts_before_its_controlnet_ends_and_ends_after_it():
    """Four workers: ControlNets (10 ms) and denoisers (50 ms) of both branches start together."""
    outcome = run(CONTROLLED, 4)
    first = sorted(
        (span for span in outcome.spans if span.what.startswith("small")), key=lambda s: s.start
    )[:4]
    assert {span.what for span in first} == {"small", "small-control"}
    assert max(span.start for span in first) - min(span.start for span in first) < 0.005
    assert len({span.node for span in first}) == 4


def test_a_denoiser_behind_its_controlnet_on_one_worker_never_blocks():
    outcome = run(CONTROLLED, 1, count=3)
    assert len(outcome.finished) == 3
    assert all(isinstance(at, float) for at in outcome.finished.values())


def test_samplers_stay_on_the_worker_of_the_requests_first():
    outcome = run(SMALL, 3)
    samplers = {span.node for span in outcome.spans if span.what == "sampler"}
    assert len(samplers) == 1


def test_a_finished_request_is_told_once():
    policy = DiFlow(nodes(1), COSTS, [SMALL], TABLES)
    policy.arrived(job(0, SMALL, 0.0), 0.0)
    done, now = 0, 0.0
    queue = [a.work for a in policy.decide(0.0) if isinstance(a, Start)]
    while queue:
        work = queue.pop(0)
        now += work.seconds
        work.done, work.ended = [1], True
        policy.ended(work, now)
        for action in policy.decide(now):
            if isinstance(action, Start):
                queue.append(action.work)
            done += isinstance(action, Finish)
    assert done == 1
    assert not policy._runs
