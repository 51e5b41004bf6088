# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Requests of one denoiser in one lease: where that gains, and who can still be on time in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kubediffusion.scheduling.policies.fleet import Board
from kubediffusion.scheduling.policies.parameters import Parameters
from kubediffusion.scheduling.policies.tickets import Lease, LeaseCosts, Shape, Ticket
from kubediffusion.scheduling.policies.waiting import Waiting
from kubediffusion.scheduling.policy import Work

# Leases that a round tries for its heads, at most (and one more for each head after that).
_TRIES = 24


@dataclass(slots=True)
class _Member:
    """A ticket as it will be when the batch begins."""

    ticket: Ticket
    steps: int
    encode: bool


class Batching:
    def __init__(
        self, costs: LeaseCosts, board: Board, waiting: Waiting, parameters: Parameters
    ) -> None:
        self._costs = costs
        self._board = board
        self._waiting = waiting
        self._parameters = parameters
        # By pipeline: whether a batch of two requests saves enough.
        self._gains: dict[int, bool] = {}

    # ---------------------------------------------------------------- from the start

    def fill(self, tickets: list[Ticket], node: int, now: float) -> None:
        """Add waiting requests of the same denoiser while everybody still ends on time."""
        start = now + self._parameters.dispatch
        while len(tickets) < self._parameters.batch:
            fellows = self._fellows(tickets[0], node)
            best = min(fellows, key=lambda head: head.rank, default=None)
            if best is None or not self._fits([_as_is(each) for each in (*tickets, best)], start):
                return
            self._waiting.take(best)
            tickets.append(best)

    def _fellows(self, ticket: Ticket, node: int) -> Iterator[Ticket]:
        can, denoiser = self._board.can[node], ticket.shape.pipeline.denoiser
        for head in self._waiting.heads():
            same = head.shape.pipeline.denoiser == denoiser
            if same and head.waits in can and head.shape.denoise_key in can and head.steps:
                yield head

    def _fits(self, members: Sequence[_Member], start: float) -> bool:
        """Whether running together gains, and ends everybody on time."""
        shapes = [each.ticket.shape for each in members]
        together = self._costs.step(shapes)
        apart = sum(shape.step for shape in shapes)
        if together > (1.0 - self._parameters.least_gain) * apart:
            return False
        at = start
        fresh = [each.ticket for each in members if each.encode]
        if fresh:
            at += self._costs.encode(fresh[0].shape, len(fresh))
        left = sorted(members, key=lambda each: each.steps)
        done = 0
        while left:
            count = left[0].steps - done
            at += count * self._costs.step([each.ticket.shape for each in left])
            done += count
            while left and left[0].steps == done:
                ticket = left.pop(0).ticket
                at += ticket.shape.decode
                if at > ticket.job.deadline - self._parameters.margin * ticket.job.solo:
                    return False
            at += self._parameters.dispatch
        return True

    # ---------------------------------------------------------------- under way

    def wanting(self) -> list[Ticket]:
        """The heads that a batch would gain something for."""
        return [head for head in self._waiting.heads() if self._gains_by_batch(head.shape)]

    def partner(self, now: float) -> Work | None:
        """The lease that gains most by taking a waiting request in at its next step."""
        best: tuple[float, Work] | None = None
        tries = _TRIES
        for head in self.wanting():
            least = self._parameters.least_slack * head.left
            for negative_slack, _, work in self._board.running.joinable(
                head.shape.pipeline.denoiser
            ):
                if -negative_slack < least:
                    break
                can = self._board.can[work.node]
                if head.waits not in can or head.shape.denoise_key not in can:
                    continue
                tries -= 1
                gain = self._joined(head, work, now)
                if gain is not None and (best is None or gain > best[0]):
                    best = (gain, work)
                if tries <= 0:
                    break
        return None if best is None else best[1]

    def _gains_by_batch(self, shape: Shape) -> bool:
        gains = self._gains.get(shape.index)
        if gains is None:
            together = self._costs.step([shape, shape])
            gains = together <= (1.0 - self._parameters.least_gain) * 2 * shape.step
            self._gains[shape.index] = gains
        return gains

    def _joined(self, head: Ticket, work: Work, now: float) -> float | None:
        """Seconds gained where `head` joins the lease at its next step; None: one would be late."""
        lease: Lease = work.info
        at = lease.start + work.setup
        for call, part in zip(work.calls, lease.parts, strict=True):
            if part.kind == "step":
                break
            at += call.count * call.seconds
        else:
            return None
        if now < at:
            return None
        done = int((now - at) / call.seconds) + 1
        if done >= call.count - 2:
            return None
        boundary = at + done * call.seconds
        members = [_Member(each, each.steps - done, encode=False) for each in lease.tickets]
        if not self._fits([*members, _as_is(head)], boundary + self._parameters.dispatch):
            return None
        shapes = [ticket.shape for ticket in lease.tickets]
        apart = self._costs.step(shapes) + head.shape.step
        gain = apart - self._costs.step([*shapes, head.shape])
        return gain * min(call.count - done, head.steps)


def _as_is(ticket: Ticket) -> _Member:
    return _Member(ticket, ticket.steps, ticket.encode)
