# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which nodes one machine runs, and when a dead one is started again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.errors import InvalidInput
from kubediffusion.local.machine import this_machine
from kubediffusion.local.plan import Machine, default_threads, parse_threads, plan_nodes
from kubediffusion.local.restart import RestartPolicy, how_it_ended
from kubediffusion.workflow import LoraDecl, ModelRef

SD3 = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
MACHINE = Machine(cpus=2, memory=8 << 30)


@dataclass(frozen=True)
class Workflow:
    """As much of a resolved workflow as a plan reads."""

    models: dict[str, ModelRef]


def workflow(*roles: str, source: str = "a", loras: tuple[LoraDecl, ...] = ()) -> Any:
    def ref(role: str) -> ModelRef:
        return ModelRef(
            role=role,
            identity=f"{role}-{source}",
            family="sd3",
            component=role.partition(".")[0],
            uri=f"file:///{source}",
            revision="",
            subfolder=role,
            variant="",
            dtype="float32",
            class_name="",
            loras=loras,
        )

    return Workflow({role: ref(role) for role in roles})


def test_a_pipeline_becomes_three_nodes() -> None:
    plans = plan_nodes([workflow(*SD3, "controlnet.edges")], {}, MACHINE)
    assert {plan.name: plan.roles for plan in plans} == {
        "text": ("text_encoder", "text_encoder_2", "text_encoder_3"),
        "denoiser": ("transformer", "controlnet.edges"),
        "image": ("vae",),
    }


def test_replicas_multiply_the_group_of_the_role() -> None:
    plans = plan_nodes([workflow(*SD3)], {"transformer": 3, "vae": 2}, MACHINE)
    assert [plan.name for plan in plans] == [
        "text",
        "denoiser-1",
        "denoiser-2",
        "denoiser-3",
        "image-1",
        "image-2",
    ]
    denoisers = [plan.models for plan in plans if plan.group == "denoiser"]
    assert denoisers == [denoisers[0]] * 3


@pytest.mark.parametrize(
    ("replicas", "field", "words"),
    [
        ({"unet": 2}, "replicas.unet", "the roles here are text_encoder, "),
        ({"vae": 0}, "replicas.vae", "must be from 1 to 64, not 0"),
        ({"vae": 1000}, "replicas.vae", "must be from 1 to 64"),
        (
            {"text_encoder": 2, "text_encoder_2": 3},
            "replicas.text_encoder_2",
            "live on the same nodes",
        ),
    ],
)
def test_wrong_replicas_say_what_to_do(replicas: dict[str, int], field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        plan_nodes([workflow(*SD3)], replicas, MACHINE)
    assert caught.value.field == field


def test_workflows_that_share_models_share_their_nodes() -> None:
    style = LoraDecl("style", "file:///style")
    plans = plan_nodes([workflow(*SD3), workflow(*SD3, loras=(style,))], {}, MACHINE)
    assert [len(plan.models) for plan in plans] == [3, 1, 1]
    # What any of them may ask for is declared at the one that serves both.
    assert all(style in model.loras for plan in plans for model in plan.models)


def test_other_models_of_another_workflow_join_the_nodes_of_their_kind() -> None:
    plans = plan_nodes([workflow(*SD3), workflow(*SD3, source="b")], {}, MACHINE)
    assert [(plan.name, len(plan.models)) for plan in plans] == [
        ("text", 6),
        ("denoiser", 2),
        ("image", 2),
    ]


@pytest.mark.parametrize(
    ("cpus", "denoisers", "threads"), [(1, 1, 1), (2, 1, 1), (4, 1, 2), (16, 1, 8), (16, 3, 4)]
)
def test_threads_are_a_share_for_each_denoiser_and_one_for_the_rest(
    cpus: int, denoisers: int, threads: int
) -> None:
    plans = plan_nodes([workflow(*SD3)], {"transformer": denoisers}, Machine(cpus, 1 << 30))
    # The same everywhere: a picture's bits depend on the thread count.
    assert {plan.threads for plan in plans} == {threads}


@given(st.integers(1, 512), st.integers(1, 64))
def test_default_threads_of_busy_nodes_never_exceed_the_machine(cpus: int, denoisers: int) -> None:
    threads = default_threads(cpus, denoisers)
    assert threads == 1 or threads * (denoisers + 1) <= cpus


def test_the_users_thread_count_is_each_nodes() -> None:
    plans = plan_nodes([workflow(*SD3)], {}, Machine(64, 1 << 30, threads=3))
    assert {plan.threads for plan in plans} == {3}


@pytest.mark.parametrize(
    ("text", "threads"), [(None, None), ("", None), (" ", None), ("4", 4), ("4,2", 4)]
)
def test_omp_num_threads_is_read_as_openmp_reads_it(text: str | None, threads: int | None) -> None:
    assert parse_threads(text) == threads


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_an_odd_omp_num_threads_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="no thread count") as caught:
        parse_threads(text)
    assert caught.value.field == "OMP_NUM_THREADS"


def test_limits_of_the_cgroup_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 28}\n")
    assert this_machine(tmp_path) == Machine(cpus=1, memory=1 << 28, threads=None)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert this_machine(tmp_path).memory > 1 << 28


def test_a_node_is_restarted_at_once_and_later_if_it_keeps_dying_young() -> None:
    policy = RestartPolicy(first=0.2, most=5.0)
    assert [policy.delay(deaths) for deaths in range(9)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    )
    assert policy.delay(10**6) == 5.0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with code 3"),
        (-9, "was killed by SIGKILL (often: out of memory)"),
        (-11, "was killed by SIGSEGV"),
        (-250, "was killed by signal 250"),
    ],
)
def test_an_end_is_told_in_words(code: int, words: str) -> None:
    assert how_it_ended(code) == words
