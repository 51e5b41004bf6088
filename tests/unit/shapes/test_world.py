# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Scenes are the same for a seed, captions say what is drawn, and the split does not leak."""

import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from train.world import (
    CLASSES,
    MIRRORED,
    RELATIONS,
    SIZES,
    Scene,
    caption,
    coverage,
    draw,
    is_held_out,
    sample_scene,
    scenes,
    token_labels,
)


def first(count: int, seed: int = 0, *, held_out: bool = False) -> list[Scene]:
    return list(islice(scenes(seed, held_out=held_out), count))


def combination(scene: Scene) -> tuple[str, ...]:
    parts = [f"{thing.color} {thing.shape}" for thing in scene.things]
    where = scene.where
    return (MIRRORED.get(where, where), *(reversed(parts) if where in MIRRORED else parts))


def test_a_seed_gives_the_same_scenes_and_another_seed_gives_others():
    assert first(20, seed=3) == first(20, seed=3)
    assert first(20, seed=3) != first(20, seed=4)


def test_drawing_is_deterministic():
    scene = first(1)[0]
    assert np.array_equal(draw(scene, 64), draw(scene, 64))


def test_no_combination_is_on_both_sides_of_the_split():
    kept = {combination(scene) for scene in first(3000)}
    held = {combination(scene) for scene in first(600, held_out=True)}
    assert kept
    assert held
    assert not kept & held


def test_about_a_tenth_is_held_out():
    rng = random.Random(0)
    share = sum(is_held_out(sample_scene(rng)) for _ in range(3000)) / 3000
    assert 0.07 < share < 0.14


def test_a_scene_and_its_mirrored_wording_are_on_the_same_side():
    for scene in (s for s in first(300) if s.where in MIRRORED):
        mirrored = Scene(scene.things[::-1], MIRRORED[scene.where], scene.background)
        assert is_held_out(mirrored) == is_held_out(scene)


@pytest.mark.parametrize("style", ["filled", "outline", "edges"])
def test_every_object_is_inside_the_picture_and_apart_from_the_other(style):
    for scene in first(200):
        masks = [coverage(thing, 64, style) > 0 for thing in scene.things]
        for mask in masks:
            rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert not rim.any()
        if len(masks) == 2:
            assert not (masks[0] & masks[1]).any()


def test_captions_name_every_object_and_the_relation():
    rng = random.Random(1)
    for scene in first(200):
        text = caption(scene, rng)
        assert all(f"{thing.color} {thing.shape}" in text for thing in scene.things)
        assert all(thing.size in text for thing in scene.things)
        assert scene.background == "white" or f"on a {scene.background} background" in text
        if scene.where in RELATIONS:
            assert scene.where in text


def test_a_vague_caption_says_no_place():
    rng = random.Random(1)
    for scene in first(200):
        text = caption(scene, rng, vague=True)
        assert not any(relation in text for relation in RELATIONS)
        assert "corner" not in text


def test_token_labels_show_the_objects():
    scene = first(1)[0]
    labels = token_labels(scene, 16)
    assert labels.shape == (16, 16)
    assert labels.max() < CLASSES
    for thing in scene.things:
        assert (labels == thing.label).any()


def test_an_outline_is_a_ring_of_the_same_size():
    scene = replace(first(1)[0], style="outline")
    thing = replace(scene.things[0], shape="circle", x=0.5, y=0.5, radius=SIZES["large"])
    ring, disc = coverage(thing, 128, "outline") > 0.5, coverage(thing, 128) > 0.5
    assert not (ring & ~disc).any()
    assert not ring[64, 64]
    assert np.ptp(np.where(ring)[0]) == np.ptp(np.where(disc)[0])
