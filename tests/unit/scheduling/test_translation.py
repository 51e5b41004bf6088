# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Live requests in a policy's words."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.scheduling.translation import (
    KEPT,
    NOTHING,
    PRIOR,
    Image,
    Part,
    Stage,
    Translator,
    parts_of,
)

TIMES = {"clip": 0.01, "t5": 0.04, "dit": 2.0, "control": 0.5, "vae": 0.1}


def image(steps: int = 20, size: float = 1.0, controls: tuple[str, ...] = ()) -> Image:
    return Image(
        "sd3",
        (Stage("clip", "encode", 1.0), Stage("t5", "encode", 1.0), Stage("t5", "encode", 1.0)),
        Stage("dit", "denoise", steps * size, steps, controls),
        (Stage("vae", "decode", size),),
    )


def translator(times=TIMES, **nodes: str) -> Translator:
    """Nodes by their models, with spaces between."""
    made = Translator(lambda model, stage, units: times.get(model))
    made.set_nodes({name: frozenset(models.split()) for name, models in nodes.items()})
    return made


def test_the_last_denoiser_is_the_lease_and_what_it_needs_is_encoded():
    tasks = [
        ("prompt", "encode", ()),
        ("base", "denoise", ("prompt",)),
        ("mask", "encode_image", ()),
        ("refine", "denoise", ("base", "prompt")),
        ("decode", "decode", ("refine", "mask")),
    ]
    assert parts_of(tasks) == {
        "prompt": Part.ENCODE,
        "base": Part.ENCODE,
        "refine": Part.STEP,
        "mask": Part.DECODE,
        "decode": Part.DECODE,
    }
    assert parts_of([("up", "upscale", ())]) == {}


def test_a_node_with_everything_leads_everything():
    found = translator(a="clip t5 dit vae", b="clip t5 dit vae")
    lead = found.lead(image(), frozenset())
    assert lead is not None
    assert lead.parts == frozenset(Part)
    assert lead.pipeline.steps == 20
    costs = found.tell(())
    assert math.isclose(lead.pipeline.encode_seconds(costs), 0.09)
    assert math.isclose(lead.pipeline.step_seconds(costs, 1), 0.1)
    assert math.isclose(lead.pipeline.solo_seconds(costs), 2.19)
    assert set(lead.pipeline.models) <= found.held("a").keys()
    assert found.apart_seconds(image(), lead) == 0.0


def test_what_does_not_lie_together_is_not_led():
    found = translator(a="clip", b="t5", c="dit", d="vae")
    lead = found.lead(image(), frozenset())
    assert lead is not None
    assert lead.parts == {Part.STEP}
    costs = found.tell(())
    assert math.isclose(lead.pipeline.solo_seconds(costs), 2.0)
    assert found.apart_seconds(image(), lead) == 0.1
    assert set(lead.pipeline.models) <= found.held("c").keys()
    assert lead.pipeline.denoiser not in found.held("a")
    assert NOTHING in found.held("a")
    assert found.held("away") == {}


def test_a_decoder_beside_some_denoisers_is_led_by_none():
    found = translator(text="clip t5", a="dit vae", b="dit")
    lead = found.lead(image(), frozenset())
    assert lead is not None
    assert lead.parts == {Part.ENCODE, Part.STEP}


def test_controlnets_have_to_be_on_the_denoisers_node():
    found = translator(a="clip t5 dit vae", b="control")
    assert found.lead(image(controls=("control",)), frozenset()) is None
    assert found.lead(image(), frozenset()) is not None
    found.set_nodes({"c": frozenset({"dit", "control"})})
    lead = found.lead(image(controls=("control",)), frozenset())
    assert lead is not None
    assert lead.parts == {Part.STEP}


def test_a_node_that_failed_it_is_without_its_models_while_there_is_another():
    found = translator(a="clip t5 dit vae", b="clip t5 dit vae")
    lead = found.lead(image(), frozenset("a"))
    assert lead is not None
    found.tell(())
    assert lead.pipeline.denoiser not in found.held("a")
    assert lead.pipeline.denoiser in found.held("b")
    everywhere = found.lead(image(), frozenset("ab"))
    assert everywhere is not None
    found.tell(())
    assert everywhere.pipeline.denoiser in found.held("a")


def test_sizes_and_steps_are_pipelines_of_their_own_at_their_own_times():
    found = Translator(lambda model, stage, units: units * TIMES[model])
    found.set_nodes({"a": frozenset(TIMES)})
    small, large, long = (
        found.lead(each, frozenset()) for each in (image(), image(size=4.0), image(steps=40))
    )
    assert small is not None
    assert large is not None
    assert long is not None
    costs = found.tell(())
    assert math.isclose(
        large.pipeline.step_seconds(costs, 1), 4 * small.pipeline.step_seconds(costs, 1)
    )
    assert long.pipeline.denoiser == small.pipeline.denoiser
    assert long.pipeline.steps == 40


def test_what_nobody_measured_is_a_prior_and_said_to_be_one():
    times = dict(TIMES)
    del times["dit"]
    found = translator(times, a="clip t5 dit vae")
    lead = found.lead(image(), frozenset())
    assert lead is not None
    assert not found.measured(image())
    assert found.seconds(lead, encode=False, steps=10) == 10 * PRIOR + 0.1
    found.tell(())
    assert found.drift() == 0.0
    times["dit"] = 4.0
    assert found.drift() == math.inf
    assert found.measured(image())
    found.tell(())
    times["dit"] = 5.0
    assert math.isclose(found.drift(), 0.25)


def test_batches_gain_nothing_for_a_policy():
    found = translator(a="clip t5 dit vae")
    lead = found.lead(image(), frozenset())
    assert lead is not None
    costs = found.tell(())
    assert costs.run(lead.pipeline.denoiser, 4) == 4 * costs.run(lead.pipeline.denoiser, 1)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=150))
def test_pipelines_are_forgotten_when_nobody_asks_for_them_any_more(steps):
    found = translator(a="clip t5 dit vae")
    leads = [found.lead(image(steps=each), frozenset()) for each in steps]
    kept = {lead.pipeline.name for lead in leads[:3] if lead is not None}
    costs = found.tell(kept)
    names = {pipeline.name for pipeline in found.pipelines}
    assert kept <= names
    assert len(names) <= KEPT
    assert not found.stale
    for pipeline in found.pipelines:
        assert pipeline.solo_seconds(costs) > 0.0
