# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes world: scenes, their captions, the held-out split, and drawing with exact edges."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Style = Literal["filled", "outline", "edges"]
Array = NDArray[np.float32]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 32),
    "green": (28, 160, 56),
    "blue": (36, 72, 222),
    "yellow": (246, 214, 36),
    "purple": (142, 40, 172),
    "orange": (248, 130, 24),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.12, "": 0.16, "large": 0.205}
NEAR, MIDDLE, FAR = 0.25, 0.5, 0.75
PLACES: dict[str, tuple[float, float]] = {
    "in the center": (MIDDLE, MIDDLE),
    "at the top": (MIDDLE, NEAR),
    "at the bottom": (MIDDLE, FAR),
    "on the left": (NEAR, MIDDLE),
    "on the right": (FAR, MIDDLE),
    "in the top left corner": (NEAR, NEAR),
    "in the top right corner": (FAR, NEAR),
    "in the bottom left corner": (NEAR, FAR),
    "in the bottom right corner": (FAR, FAR),
}
# Where the first and the second object named in the caption are.
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "above": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "below": ((MIDDLE, FAR), (MIDDLE, NEAR)),
    "left of": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "right of": ((FAR, MIDDLE), (NEAR, MIDDLE)),
}
MIRRORED = {"below": "above", "right of": "left of"}
POSITION_JITTER, RADIUS_JITTER = 0.015, 0.03
CLASSES = len(COLORS) * len(SHAPES) + len(BACKGROUNDS)
HELD_OUT_TENTHS = 1
LINE_WIDTH = {"outline": 0.03, "edges": 0.016}  # shares of the picture's width


@dataclass(frozen=True)
class Thing:
    """One object; x, y and radius are shares of the picture's width."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def label(self) -> int:
        """The class of a token that shows this object."""
        return list(COLORS).index(self.color) * len(SHAPES) + SHAPES.index(self.shape)


@dataclass(frozen=True)
class Scene:
    """One or two objects; `where` is a place (one object) or a relation (two)."""

    things: tuple[Thing, ...]
    where: str
    background: str
    style: Style = "filled"


def sample_scene(rng: random.Random, pair_share: float = 0.6) -> Scene:
    """A random scene of one object, or of two with different colours."""
    count = 2 if rng.random() < pair_share else 1
    where = rng.choice(list(RELATIONS if count == 2 else PLACES))
    centers = RELATIONS[where] if count == 2 else (PLACES[where],)
    colors = rng.sample(list(COLORS), count)
    things = tuple(
        _sample_thing(rng, color, center) for color, center in zip(colors, centers, strict=True)
    )
    return Scene(things, where, rng.choice(list(BACKGROUNDS)))


def _sample_thing(rng: random.Random, color: str, center: tuple[float, float]) -> Thing:
    size = rng.choices(list(SIZES), [0.25, 0.5, 0.25])[0]
    return Thing(
        color=color,
        shape=rng.choice(SHAPES),
        size=size,
        x=center[0] + rng.uniform(-POSITION_JITTER, POSITION_JITTER),
        y=center[1] + rng.uniform(-POSITION_JITTER, POSITION_JITTER),
        radius=SIZES[size] * rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER),
    )


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's combination of colours, shapes and arrangement is kept from training.

    "A above B" and "B below A" are one arrangement, so both are held out or neither is.
    """
    parts = [f"{thing.color} {thing.shape}" for thing in scene.things]
    where = scene.where
    if where in MIRRORED:
        where, parts = MIRRORED[where], parts[::-1]
    digest = hashlib.sha256("|".join([where, *parts]).encode()).digest()
    return digest[0] % 10 < HELD_OUT_TENTHS


def scenes(seed: int, *, held_out: bool, pair_share: float = 0.6) -> Iterator[Scene]:
    """An endless, seeded stream of scenes from one side of the split."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, pair_share)
        if is_held_out(scene) == held_out:
            yield scene


def caption(scene: Scene, rng: random.Random, *, vague: bool = False) -> str:
    """A sentence for the scene; a vague one leaves the places out."""
    said = [_noun_phrase(thing) for thing in scene.things]
    if len(said) == 1:
        place = " somewhere" if vague else " " + scene.where
        if scene.where == "in the center" and not vague and rng.random() < 0.6:
            place = ""
        text = said[0] + place
    elif vague:
        text = f"{said[0]} and {said[1]}"
    else:
        relation = scene.where
        if relation.endswith("of") and rng.random() < 0.6:
            relation = "to the " + relation
        text = f"{said[0]} {relation} {said[1]}"
    # White is the background a caption means when it names none.
    if scene.background != "white" or rng.random() < 0.4:
        text += f" on a {scene.background} background"
    return text


def _noun_phrase(thing: Thing) -> str:
    words = " ".join(word for word in (thing.size, thing.color, thing.shape) if word)
    return f"{'an' if words[0] == 'o' else 'a'} {words}"


def signed_distance(shape: str, dx: Array, dy: Array, radius: float) -> Array:
    """Distance to the outline (below 0 inside), so that edges can be drawn exactly."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.88 * radius
    if shape == "triangle":
        sides = 0.8660254 * ax - 0.5 * (dy + 0.9 * radius)
        return np.maximum(sides, dy - 0.8320508 * radius)
    arm = 0.36 * radius
    upright = np.maximum(ax - arm, ay - radius)
    return np.minimum(upright, np.maximum(ax - radius, ay - arm))


def coverage(thing: Thing, pixels: int, style: Style = "filled") -> Array:
    """The share of each pixel that the object covers, (pixels, pixels)."""
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
    distance = signed_distance(
        thing.shape, axis[None, :] - thing.x, axis[:, None] - thing.y, thing.radius
    )
    if style == "outline":  # a ring inside the filled shape's outline: the size stays the same
        half = LINE_WIDTH["outline"] / 2
        distance = np.abs(distance + half) - half
    elif style == "edges":
        distance = np.abs(distance) - LINE_WIDTH["edges"] / 2
    return np.clip(0.5 - distance * pixels, 0, 1).astype(np.float32)


def draw(scene: Scene, pixels: int) -> NDArray[np.uint8]:
    """The scene as (pixels, pixels, 3); style "edges" is white lines on black."""
    edges = scene.style == "edges"
    back = (0, 0, 0) if edges else BACKGROUNDS[scene.background]
    image = np.broadcast_to(np.float32(back), (pixels, pixels, 3))
    for thing in scene.things:
        color = np.float32((255, 255, 255) if edges else COLORS[thing.color])
        share = coverage(thing, pixels, scene.style)[..., None]
        image = image * (1 - share) + color * share
    return np.rint(image).astype(np.uint8)


def token_labels(scene: Scene, cells: int) -> NDArray[np.int64]:
    """The class, an object's or the background's, at the middle of cells x cells squares."""
    back = CLASSES - len(BACKGROUNDS) + list(BACKGROUNDS).index(scene.background)
    labels = np.full((cells, cells), back, dtype=np.int64)
    for thing in scene.things:
        labels[coverage(thing, cells) >= 0.5] = thing.label
    return labels
