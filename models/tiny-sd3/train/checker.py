# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A deterministic judge: does the picture show what the scene says?"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from math import hypot

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from train.world import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing, coverage

Mask = NDArray[np.bool_]

NAMES = (*COLORS, *BACKGROUNDS)
PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float32)
TEMPLATE_SIDE = 48
MIN_AREA = 0.003  # a third of the smallest object; anything below is a speck
MIN_OVERLAP = 0.8  # a blob that overlaps no template this well has no shape
MAX_SHIFT = 0.1
SIZE_BORDERS = (0.139, 0.182)  # half-way between the radii of neighbouring sizes
HALF_EXTENT = {"circle": 1.0, "square": 0.88, "triangle": 1.0, "cross": 1.0}


@dataclass(frozen=True)
class Found:
    """One blob of an object's colour; shape is empty when it looks like none."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Verdict:
    """What is right about a picture."""

    color: bool
    shape: bool
    place: bool
    size: bool
    background: bool
    no_extras: bool

    @property
    def right(self) -> bool:
        """Whether everything is."""
        return all(asdict(self).values())


def check(image: NDArray[np.uint8], scene: Scene, *, anywhere: bool = False) -> Verdict:
    """Compare a picture with its scene; `anywhere` accepts every arrangement of the objects."""
    found, background = find_things(image, outlined=scene.style == "outline")
    pairs = [(thing, _best(thing, found)) for thing in scene.things]
    seen = [(thing, match) for thing, match in pairs if match is not None]
    complete = len(seen) == len(pairs)
    return Verdict(
        color=complete,
        shape=complete and all(match.shape == thing.shape for thing, match in seen),
        place=complete and (anywhere or _placed(scene, [match for _, match in seen])),
        size=complete and all(size_of(match.radius) == thing.size for thing, match in seen),
        background=background == scene.background,
        no_extras=len(found) <= len(scene.things),
    )


def _best(thing: Thing, found: list[Found]) -> Found | None:
    same = [blob for blob in found if blob.color == thing.color]
    return max(same, key=lambda blob: (blob.shape == thing.shape, blob.radius), default=None)


def _placed(scene: Scene, matches: list[Found]) -> bool:
    near = all(
        hypot(match.x - thing.x, match.y - thing.y) < MAX_SHIFT
        for thing, match in zip(scene.things, matches, strict=True)
    )
    if len(matches) == 1 or not near:
        return bool(near)
    first, second = RELATIONS[scene.where]
    along = 0 if first[0] != second[0] else 1
    gap = (matches[0].x - matches[1].x, matches[0].y - matches[1].y)[along]
    return bool(gap * (first[along] - second[along]) > 0)


def size_of(radius: float) -> str:
    """The size word for a radius."""
    return list(SIZES)[int(np.searchsorted(SIZE_BORDERS, radius))]


def find_things(image: NDArray[np.uint8], *, outlined: bool = False) -> tuple[list[Found], str]:
    """Every blob of an object's colour, and the colour of the picture's rim."""
    nearest = _nearest_color(image)
    rim = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background = NAMES[int(np.bincount(rim, minlength=len(NAMES)).argmax())]
    found = []
    for index, color in enumerate(COLORS):
        for blob in _blobs(nearest == index):
            solid = ndimage.binary_fill_holes(blob) if outlined else blob
            if outlined and not _is_ring(blob, solid):
                continue
            found.append(_describe(color, solid))
    return found, background


def _nearest_color(image: NDArray[np.uint8]) -> NDArray[np.intp]:
    flat = image.reshape(-1, 3).astype(np.float32)
    return ((flat[:, None] - PALETTE) ** 2).sum(-1).argmin(-1).reshape(image.shape[:2])


def _blobs(mask: Mask) -> list[Mask]:
    """Connected regions; thin rims of in-between colours around other objects are none."""
    core = ndimage.binary_erosion(mask, np.ones((3, 3)))
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    regions = (labels == index for index in range(1, count + 1))
    return [r for r in regions if r.sum() >= MIN_AREA * mask.size and core[r].any()]


def _is_ring(blob: Mask, solid: Mask) -> bool:
    return bool(solid.sum() > 1.15 * blob.sum())


def _describe(color: str, blob: Mask) -> Found:
    side = blob.shape[0]
    rows, columns = np.where(blob)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    box = _resized(blob[top:bottom, left:right])
    overlaps = {shape: _overlap(box, _template(shape)) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    radius = max(bottom - top, right - left) / 2 / side / HALF_EXTENT[shape]
    found = Found(color, shape, (left + right) / 2 / side, (top + bottom) / 2 / side, radius)
    return found if overlaps[shape] >= MIN_OVERLAP else replace(found, shape="")


def _overlap(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


def _resized(mask: Mask) -> Mask:
    size = (TEMPLATE_SIDE, TEMPLATE_SIDE)
    gray = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return np.asarray(gray) > 127


@cache
def _template(shape: str) -> Mask:
    mask = coverage(Thing("red", shape, "", 0.5, 0.5, 0.4), 256) >= 0.5
    rows, columns = np.where(mask)
    return _resized(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])


def silhouette_overlap(image: NDArray[np.uint8], scene: Scene) -> float:
    """Intersection over union of what is not background with the scene's objects."""
    nearest = _nearest_color(image)
    rim = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    drawn = nearest != np.bincount(rim, minlength=len(NAMES)).argmax()
    wanted = np.zeros_like(drawn)
    for thing in scene.things:
        wanted |= coverage(thing, len(drawn)) >= 0.5
    return _overlap(drawn, wanted)
