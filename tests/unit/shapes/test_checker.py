# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The judge accepts what is right and refuses what is wrong, each kind of wrong by its name."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from train.checker import check, silhouette_overlap
from train.world import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Style, Thing, draw, scenes


def some(count: int, seed: int = 11, style: Style = "filled") -> list[Scene]:
    return [replace(s, style=style) for s in islice(scenes(seed, held_out=False), count)]


def change(scene: Scene, **values: object) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **values), *scene.things[1:]))


def other(options: object, than: str) -> str:
    return next(option for option in options if option != than)


@pytest.mark.parametrize("style", ["filled", "outline"])
def test_true_pictures_are_right(style):
    for scene in some(40, style=style):
        assert check(draw(scene, 128), scene).right, scene


def test_true_pictures_are_right_at_256_pixels():
    for scene in some(8):
        assert check(draw(scene, 256), scene).right, scene


def test_pictures_of_other_scenes_are_refused():
    wanted = some(40)
    for scene, drawn in zip(wanted, [*wanted[1:], wanted[0]], strict=True):
        assert not check(draw(drawn, 128), scene).right


def test_each_wrong_is_seen():
    for scene in some(12):
        picture, thing = draw(scene, 128), scene.things[0]
        used = {t.color for t in scene.things}
        color = next(c for c in COLORS if c not in used)
        assert not check(picture, change(scene, color=color)).color
        assert not check(picture, change(scene, shape=other(SHAPES, thing.shape))).shape
        assert not check(picture, change(scene, size=other(SIZES, thing.size))).size
        assert not check(picture, change(scene, x=1 - thing.x + 0.3)).place
        back = other(BACKGROUNDS, scene.background)
        assert not check(picture, replace(scene, background=back)).background


def test_an_object_too_many_is_seen():
    scene = next(s for s in some(50) if len(s.things) == 2)
    alone = replace(scene, things=scene.things[:1], where="in the center")
    assert not check(draw(scene, 128), alone).no_extras


def test_swapped_objects_are_refused_unless_any_arrangement_will_do():
    scene = next(s for s in some(50) if s.where == "above")
    one, two = scene.things
    swapped = replace(scene, things=(replace(one, y=two.y), replace(two, y=one.y)))
    assert not check(draw(swapped, 128), scene).place
    assert check(draw(swapped, 128), scene, anywhere=True).place


def test_a_filled_shape_is_no_outline():
    scene = some(1)[0]
    assert not check(draw(scene, 128), replace(scene, style="outline")).right


def test_a_shapeless_blob_has_no_shape():
    scene = Scene((Thing("red", "circle", "", 0.5, 0.5, 0.16),), "in the center", "white")
    picture = draw(scene, 128)
    picture[44:64, 44:64] = BACKGROUNDS["white"]
    assert not check(picture, scene).shape


def test_silhouette_overlap_is_1_for_the_scene_and_0_for_an_empty_picture():
    scene = some(1)[0]
    assert silhouette_overlap(draw(scene, 128), scene) > 0.95
    empty = np.full((128, 128, 3), BACKGROUNDS["white"], dtype=np.uint8)
    assert silhouette_overlap(empty, scene) == 0
