# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A live request in a policy's words: its tasks as a pipeline of measured times, nodes as records.

A policy knows models by name and their times by name. The same network takes other times for
another size, so what it is told of as a model is a *use*: the networks of one part of a request
(its encoders; its denoiser with ControlNets; its decoders) at an amount of work. A node "holds" a
use where it has all networks of it.

    request     policy's pipeline      led: on the node of the policy's choice
    encode*  →  one encoder            if some node has all encoders
    denoise  →  the denoiser           always, with its ControlNets on the same node
    decode*  →  the decoder            if every node that can denoise has them

What is not led is placed task by task, as without a policy, and costs the policy nothing. Nodes
that a request is to avoid (it failed there, or could not go on from its checkpoint) are to the
policy without its models, while others have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kubediffusion.scheduling.costs import DEFAULT, Costs, ModelCosts, Run
from kubediffusion.scheduling.pipelines import Pipeline, Sizes

# A use of nothing, which every node has.
NOTHING = "nothing"
# Seconds of a stage, of a lease's step, that nobody has measured yet.
PRIOR = 0.05
# Pipelines that no open request needs are forgotten beyond so many.
KEPT = 64
LEADS = 1024

# Seconds of a stage at an amount of work, by (model, stage, units); None: nobody knows.
Measured = Callable[[str, str, float], float | None]


class Part(Enum):
    ENCODE = "encode"
    STEP = "denoise"
    DECODE = "decode"


def parts_of(tasks: Sequence[tuple[str, str, Iterable[str]]]) -> dict[str, Part]:
    """What each task is to a policy; `tasks` are (name, stage, producers), producers first.

    The last denoiser is the lease; what it needs is encoded before, the rest comes after. Empty
    without a denoiser: such a request is not led.
    """
    lease = next((name for name, stage, _ in reversed(tasks) if stage == "denoise"), None)
    if lease is None:
        return {}
    needed = {lease}
    for name, _, producers in reversed(tasks):
        if name in needed:
            needed.update(producers)
    return {
        name: Part.STEP if name == lease else Part.ENCODE if name in needed else Part.DECODE
        for name, _, _ in tasks
    }


@dataclass(frozen=True, slots=True)
class Stage:
    """A task's work: `units` of it, of all `steps` together; `helpers` are on the same node."""

    model: str
    stage: str
    units: float
    steps: int = 0
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Use:
    """The stages of one part of a request. `avoids`: addresses that count as without models."""

    stages: tuple[Stage, ...] = ()
    avoids: frozenset[str] = frozenset()

    @property
    def models(self) -> frozenset[str]:
        return frozenset(m for each in self.stages for m in (each.model, *each.helpers))

    @property
    def name(self) -> str:
        if not self.stages:
            return NOTHING
        stages = (
            f"{s.stage} {'+'.join((s.model, *s.helpers))} {s.units / max(1, s.steps):.6g}"
            for s in self.stages
        )
        without = f" not on {', '.join(sorted(self.avoids))}" if self.avoids else ""
        return ", ".join(sorted(stages)) + without

    def seconds(self, measured: Measured) -> float | None:
        """Of all stages, of a denoiser those of one step; None unless all were measured."""
        total = 0.0
        for each in self.stages:
            found = measured(each.model, each.stage, each.units)
            if found is None:
                return None
            total += found / max(1, each.steps)
        return total


@dataclass(frozen=True, slots=True)
class Image:
    """One image's work by part. The lease is `step`."""

    family: str
    encode: tuple[Stage, ...]
    step: Stage
    decode: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Lead:
    """An image under a policy: its pipeline, and which parts go where the policy says."""

    pipeline: Pipeline
    parts: frozenset[Part]
    uses: Mapping[Part, Use]

    def part_of(self, model: str) -> Part:
        """What a call of a work does, by the name of its model."""
        pipeline = self.pipeline
        if model == pipeline.denoiser:
            return Part.STEP
        return Part.DECODE if model == pipeline.decoder else Part.ENCODE


class Translator:
    """The pipelines that a policy is told of, kept from request to request. No clock, no I/O.

    ``stale``: the policy has not been told of all of them yet, at the times as they are now.
    """

    def __init__(self, measured: Measured) -> None:
        self.stale = False
        self._measured = measured
        self._nodes: Mapping[str, frozenset[str]] = {}
        self._leads: dict[tuple[Image, frozenset[str]], Lead | None] = {}
        self._pipelines: dict[str, Pipeline] = {}
        self._uses: dict[str, Use] = {}
        self._told: dict[str, float | None] = {}

    # ---------------------------------------------------------------- nodes

    def set_nodes(self, ready: Mapping[str, frozenset[str]]) -> None:
        """The models that each node can run now, by address; nodes that take nothing left out."""
        self._nodes = ready
        self._leads.clear()

    def held(self, address: str) -> dict[str, float]:
        """The uses that a node holds, for its record; sizes are the planner's business."""
        ready = self._nodes.get(address)
        if ready is None:
            return {}
        held = {
            name: 0.0
            for name, use in self._uses.items()
            if use.models <= ready and address not in use.avoids
        }
        return {NOTHING: 0.0, **held}

    # ---------------------------------------------------------------- requests

    def lead(self, image: Image, avoided: frozenset[str]) -> Lead | None:
        """How a policy can lead it on the nodes of now, better not on those to be `avoided`; None
        where no node has its denoiser."""
        key = (image, avoided)
        if key not in self._leads:
            if len(self._leads) >= LEADS:
                self._leads.clear()
            self._leads[key] = self._lead(image, avoided)
        return self._leads[key]

    def _lead(self, image: Image, avoided: frozenset[str]) -> Lead | None:
        step, able = self._use((image.step,), avoided)
        if not able:
            return None
        encode, encoders = self._use(image.encode, avoided)
        decode = Use(image.decode)
        uses = {Part.ENCODE: Use(), Part.STEP: step, Part.DECODE: Use()}
        if encode.stages and encoders:
            uses[Part.ENCODE] = encode
        if decode.stages and all(decode.models <= self._nodes[address] for address in able):
            uses[Part.DECODE] = decode
        parts = frozenset(part for part, use in uses.items() if use.stages)
        return Lead(self._pipeline(image, uses), parts, uses)

    def _use(self, stages: tuple[Stage, ...], avoided: frozenset[str]) -> tuple[Use, set[str]]:
        """Some stages as a use, and the nodes that hold it."""
        models = Use(stages).models
        able = {address for address, ready in self._nodes.items() if models <= ready}
        avoids = avoided & able
        if len(avoids) == len(able):  # better there than nowhere
            return Use(stages), able
        return Use(stages, avoids), able - avoids

    def _pipeline(self, image: Image, uses: Mapping[Part, Use]) -> Pipeline:
        names = {part: use.name for part, use in uses.items()}
        name = " | ".join((*names.values(), str(image.step.steps)))
        known = self._pipelines.pop(name, None)
        if known is None:
            self.stale = True
            known = Pipeline(
                name,
                image.family,
                (names[Part.ENCODE],),
                names[Part.STEP],
                names[Part.DECODE],
                image.step.steps,
                prompts=1,
                branches=1,
                decode_mode=DEFAULT,
                sizes=Sizes(0, 0, 0),
            )
            self._uses |= {use.name: use for use in uses.values() if use.stages}
        self._pipelines[name] = known  # the one asked for last is last
        return known

    def seconds(self, lead: Lead, *, encode: bool, steps: int) -> float:
        """What is left of a request, of the led parts: encoding or not, so many steps, decoding."""
        each = {part: self._seconds(use) for part, use in lead.uses.items()}
        return each[Part.ENCODE] * encode + each[Part.STEP] * steps + each[Part.DECODE]

    def measured(self, image: Image) -> bool:
        """Whether every stage was measured: before that nobody can say what is in time."""
        uses = (Use(image.encode), Use((image.step,)), Use(image.decode))
        return all(use.seconds(self._measured) is not None for use in uses)

    def apart_seconds(self, image: Image, lead: Lead) -> float:
        """What is to come after the led parts, elsewhere."""
        return 0.0 if Part.DECODE in lead.parts else self._seconds(Use(image.decode))

    def _seconds(self, use: Use) -> float:
        measured = use.seconds(self._measured)
        return PRIOR * len(use.stages) if measured is None else measured

    # ---------------------------------------------------------------- what a policy is told

    @property
    def pipelines(self) -> list[Pipeline]:
        return list(self._pipelines.values())

    def drift(self) -> float:
        """By what share some time is another than what was told; infinite where one that nobody
        knew is known."""
        most = 0.0
        for name, told in self._told.items():
            now = self._uses[name].seconds(self._measured)
            if now is not None and now != told:
                most = max(most, abs(now - told) / told if told else math.inf)
        return most

    def tell(self, needed: Iterable[str]) -> Costs:
        """The times of all pipelines, as they are now. Forgets the oldest of those that are not
        `needed`, by name."""
        keep = set(needed)
        for name in [name for name in self._pipelines if name not in keep]:
            if len(self._pipelines) > max(KEPT, len(keep)):
                del self._pipelines[name]
                self._leads.clear()
        used = {m for each in self._pipelines.values() for m in each.models}
        self._uses = {name: use for name, use in self._uses.items() if name in used}
        self._told = {name: use.seconds(self._measured) for name, use in self._uses.items()}
        self.stale = False
        models = {name: _model(self._seconds(use)) for name, use in self._uses.items()}
        return Costs({NOTHING: _model(0.0), **models})


def _model(seconds: float) -> ModelCosts:
    """Batches gain nothing: what a node runs exactly it runs one after the other."""
    return ModelCosts(0.0, 0.0, {DEFAULT: (Run(1, seconds),)})
