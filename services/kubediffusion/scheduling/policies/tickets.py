# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request under way, and what the work that is left of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policy import Call, Work


@dataclass(slots=True, eq=False)
class Shape:
    """A pipeline with its costs worked out, and the two sets of models that it needs in turn.

    ``encode_key`` and ``denoise_key`` number the sets; ``step`` is a whole step of one request on
    one node, ``split`` the same with the branches on two.
    """

    index: int
    pipeline: Pipeline
    encode_key: int
    denoise_key: int
    family: int
    encode: float
    step: float
    split: float
    decode: float

    @property
    def whole(self) -> float:
        return self.encode + self.pipeline.steps * self.step + self.decode


@dataclass(slots=True, eq=False)
class Ticket:
    """What is left of a request. `lst` is the latest start: deadline less the work that is left."""

    job: Job
    shape: Shape
    encode: bool = True
    steps: int = 0
    decode: bool = True
    lst: float = 0.0
    rank: float = 0.0
    # The node with its embeddings and latents.
    at: int = -1
    work: Work | None = None
    # The key of the heap that it waits in; -1: in none.
    waits: int = -1
    begun: bool = False
    claim: Claim = field(init=False)

    @property
    def left(self) -> float:
        """Seconds of one node, alone, without setups."""
        shape = self.shape
        return (
            (shape.encode if self.encode else 0.0)
            + self.steps * shape.step
            + (shape.decode if self.decode else 0.0)
        )

    @property
    def key(self) -> int:
        return self.shape.encode_key if self.encode else self.shape.denoise_key


@dataclass(slots=True, eq=False)
class Claim:
    """A request in a test of feasibility: the seconds that are left of it, and the latest moment
    to start them. While a lease runs, until `until`, what is left is `base` less `fall` times now.
    Open requests are numbered as they come."""

    ticket: Ticket
    deadline: float
    serial: int
    left: float = 0.0
    lst: float = 0.0
    base: float = 0.0
    fall: float = 0.0
    until: float = 0.0


@dataclass(slots=True)
class Part:
    """What call i of a lease does: encode these, step these, or decode this one."""

    kind: str
    tickets: tuple[Ticket, ...]


@dataclass(slots=True, eq=False)
class Lease:
    """The policy's side of a `Work`, which starts at `start` and ends at `end` as expected."""

    tickets: tuple[Ticket, ...]
    parts: list[Part]
    start: float
    end: float
    split: bool = False
    revoked: bool = False
    joining: bool = False
    over: bool = False
    serial: int = 0
    # The most it can be put off without a ticket of it becoming late.
    slack: float = 0.0
    # What its rank would be, were it revoked: this, plus the share of laxity in it times now.
    rank: float = 0.0
    # Of each ticket's own work, as if alone, what the lease does: seconds.
    spent: list[float] = field(default_factory=list[float])


class LeaseCosts:
    """Seconds of the pieces of leases. `dispatch` is paid by each work, `sampler` by each step."""

    def __init__(self, costs: Costs, dispatch: float, sampler: float) -> None:
        self.costs = costs
        self.dispatch = dispatch
        self.sampler = sampler
        self._steps: dict[tuple[tuple[int, ...], bool], float] = {}

    def encode(self, shape: Shape, requests: int = 1) -> float:
        """All prompts of `requests` requests, one batch an encoder."""
        pipeline = shape.pipeline
        batch = pipeline.prompts * requests
        return sum(self.costs.run(model, batch) for model in pipeline.encoders)

    def step(self, shapes: Sequence[Shape], *, split: bool = False) -> float:
        """One step of requests with the same denoiser, batched; `split`: a branch on each of two
        nodes, which exchange the predicted noise."""
        key = (tuple(sorted(shape.index for shape in shapes)), split)
        seconds = self._steps.get(key)
        if seconds is None:
            seconds = self._steps[key] = self._step(shapes, split)
        return seconds

    def _step(self, shapes: Sequence[Shape], split: bool) -> float:
        first = shapes[0].pipeline
        branches = 1 if split else first.branches
        seconds = self._forward(first.denoiser, branches * len(shapes))
        users: dict[str, int] = {}
        for shape in shapes:
            for control in shape.pipeline.controls:
                users[control] = users.get(control, 0) + branches
        seconds += sum(self._forward(control, batch) for control, batch in users.items())
        if split:
            seconds += 2 * self.costs.transfer(first.sizes.latents, same_host=False)
        return seconds + self.sampler

    def _forward(self, model: str, batch: int) -> float:
        """One batch, or single calls where batching loses."""
        return min(self.costs.run(model, batch), batch * self.costs.run(model, 1))

    def moved(self, ticket: Ticket, node: int, host: int, hosts: Sequence[int]) -> float:
        """Pulling what the ticket left on another node."""
        if ticket.at in (-1, node):
            return 0.0
        sizes = ticket.shape.pipeline.sizes
        return self.costs.transfer(sizes.embeddings + sizes.latents, hosts[ticket.at] == host)


def calls_of(
    costs: LeaseCosts, tickets: Sequence[Ticket], *, split: bool, encode_only: bool
) -> tuple[list[Call], list[Part]]:
    """All that is left of `tickets` as calls: encode, step together while all have steps, decode.

    Tickets with more steps than the others come back with the rest.
    """
    calls: list[Call] = []
    parts: list[Part] = []
    fresh = tuple(ticket for ticket in tickets if ticket.encode)
    groups: dict[int, list[Ticket]] = {}
    for ticket in fresh:
        groups.setdefault(ticket.shape.encode_key, []).append(ticket)
    for group in groups.values():
        shape = group[0].shape
        calls.append(Call(shape.pipeline.encoders[0], 1, costs.encode(shape, len(group))))
        parts.append(Part("encode", tuple(group)))
    if encode_only:
        return calls, parts
    stepping = tuple(ticket for ticket in tickets if ticket.steps)
    together = min((ticket.steps for ticket in stepping), default=0)
    if together:
        seconds = costs.step([ticket.shape for ticket in stepping], split=split)
        batch = len(stepping) * (1 if split else stepping[0].shape.pipeline.branches)
        calls.append(Call(stepping[0].shape.pipeline.denoiser, together, seconds, batch))
        parts.append(Part("step", stepping))
    if not split:
        done = [ticket for ticket in tickets if ticket.steps == together and ticket.decode]
        for ticket in sorted(done, key=lambda each: each.lst):
            calls.append(Call(ticket.shape.pipeline.decoder, 1, ticket.shape.decode))
            parts.append(Part("decode", (ticket,)))
    return calls, parts
