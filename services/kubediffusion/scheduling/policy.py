# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The interface between a scheduling policy and whoever drives it.

A driver (the gateway's coordinator with its own clock and the nodes' reports, or the simulator)
keeps the `Node` records true, tells the policy what happened, and then asks it to `decide`; it
carries the actions out in their order. A policy has no clock and does no I/O: the same calls give
the same actions. One policy schedules the requests of one gateway; where several gateways share
nodes, what others run there shows in `Node.foreign_until`.

    driver                               policy
      arrived(job, now)           ──▶
      ended(work, now)            ──▶      work.done says how far each call got
      lost(work, now)             ──▶      its node is gone; done counts what a checkpoint kept
      fleet_changed(now)          ──▶      a node came, went, or its models changed
      decide(now)                 ──▶      [Start, Shed, Revoke, Load, Evict]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline


@dataclass(slots=True, eq=False)
class Node:
    """A model node, as last heard of. `resident` maps models to bytes, least recently used first.

    ``free_at`` is when the work that this policy gave it ends, as expected; ``loading`` maps the
    models on their way to when they will be there.
    """

    index: int
    host: int
    memory: float
    resident: dict[str, float] = field(default_factory=dict[str, float])
    loading: dict[str, float] = field(default_factory=dict[str, float])
    up: bool = True
    # Work of other gateways keeps it until then; 0: none that we know of.
    foreign_until: float = 0.0

    def holds(self, models: Sequence[str]) -> bool:
        resident = self.resident
        return all(model in resident for model in models)


@dataclass(slots=True, eq=False)
class Call:
    """`count` forwards, one after the other, of `seconds` each as expected; revocable in between.

    ``model`` names the one that dominates; a step with ControlNets counts as the denoiser's call.
    """

    model: str
    count: int
    seconds: float
    batch: int = 1


@dataclass(slots=True, eq=False)
class Work:
    """Calls run back to back on a node (and its `helpers`, which are busy as long).

    ``setup`` seconds go before: dispatch and pulling inputs. A node loads those of ``models`` that
    it lacks first. ``done[i]`` forwards of call i were completed when the work ended.
    ``after``: another work that must end at least `tail` seconds before this one can (a deferred
    input: it may start earlier). ``info`` is the policy's own.
    """

    node: int
    jobs: tuple[Job, ...]
    calls: tuple[Call, ...]
    models: tuple[str, ...] = ()
    setup: float = 0.0
    helpers: tuple[int, ...] = ()
    after: Work | None = None
    tail: float = 0.0
    info: Any = None
    done: list[int] = field(default_factory=list[int])
    ended: bool = False

    @property
    def seconds(self) -> float:
        return self.setup + sum(call.count * call.seconds for call in self.calls)

    @property
    def complete(self) -> bool:
        return all(
            done == call.count for done, call in zip(self.done, self.calls, strict=False)
        ) and len(self.done) == len(self.calls)


@dataclass(frozen=True, slots=True)
class Start:
    work: Work


@dataclass(frozen=True, slots=True)
class Revoke:
    """The work ends at its next boundary; `ended` follows with what was done."""

    work: Work


@dataclass(frozen=True, slots=True)
class Shed:
    """The request is refused or dropped: its deadline cannot be met, or costs others theirs."""

    job: Job


@dataclass(frozen=True, slots=True)
class Load:
    """Bring `model` to an idle node, first evicting `evict`. The node is busy meanwhile."""

    node: int
    model: str
    evict: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The request is complete; the driver hands its result out."""

    job: Job


Action = Start | Revoke | Shed | Load | Finish


class Policy(Protocol):
    """What a driver calls. `nodes` are shared with the driver, which keeps them true."""

    nodes: Sequence[Node]

    def arrived(self, job: Job, now: float) -> None: ...

    def ended(self, work: Work, now: float) -> None: ...

    def lost(self, work: Work, now: float) -> None: ...

    def fleet_changed(self, now: float) -> None: ...

    def decide(self, now: float) -> Sequence[Action]: ...

    def wake_at(self, now: float) -> float | None:
        """When to be asked again even if nothing happens until then."""
        ...


class LivePolicy(Policy, Protocol):
    """What a driver tells beside, where clients go away and run times are learnt as they come.

    `nodes` may grow before `fleet_changed`; each keeps its place.
    """

    def shares(self, shared: bool, now: float) -> None:
        """Whether other gateways have work on the same nodes; else `foreign_until` is 0 of all."""
        ...

    def withdrawn(self, job: Job, now: float) -> None:
        """The request is not the policy's any more. Its work, if it had one, was told of as
        ended. Unknown requests are ignored."""
        ...

    def learnt(self, costs: Costs, pipelines: Sequence[Pipeline], now: float) -> None:
        """All times and pipelines from now on; those of open requests are among them."""
        ...
