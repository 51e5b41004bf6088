# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which revision of a workflow the gateways serve, and when those before have done their part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kubediffusion_operator.planning.draining import Draining, left, written
from kubediffusion_operator.planning.hosting import as_used
from kubediffusion_operator.planning.names import status_of
from kubediffusion_operator.planning.residency import key_of
from kubediffusion_operator.planning.revisions import History, Known
from kubediffusion_operator.planning.standing import Standing


@dataclass(slots=True)
class Rollout:
    """`served` is what gateways are told; `draining` are in use by requests that they got."""

    history: History
    served: Known | None = None
    draining: list[Draining] = field(default_factory=list[Draining])
    since: str = ""

    @property
    def newest(self) -> Known | None:
        return self.history.newest

    @property
    def replace(self) -> bool:
        return self.newest is not None and self.newest.definition.spec.strategy == "Replace"

    @property
    def is_done(self) -> bool:
        return self.served is None or self.served is self.newest

    @property
    def wanted(self) -> list[Known]:
        """What is served and what is to be, the newest first; each once."""
        found = [self.newest, self.served] if self.served is not self.newest else [self.newest]
        return [known for known in found if known is not None]

    @property
    def in_use(self) -> list[Known]:
        """The newest first; each once."""
        return [*self.wanted, *(each.known for each in self.draining)]

    @property
    def remaining(self) -> float | None:
        """Seconds until one that drains has to be looked at."""
        given = [each.remaining for each in self.draining if each.remaining is not None]
        return min(given, default=None)

    @property
    def watched(self) -> frozenset[str]:
        """Models whose nodes have to say that they are idle."""
        return frozenset[str]().union(*(each.watched for each in self.draining))

    @property
    def roles(self) -> dict[str, str]:
        """The newest revision's models: role to identity, sorted."""
        if self.newest is None:
            return {}
        models = self.newest.resolved.models
        return {role: models[role].identity for role in sorted(models)}


def rolled(history: History, standings: Mapping[str, Standing], now: str) -> Rollout:
    """The newest is served when all its models are Ready, and its LoRAs known to their nodes; at
    once where nothing is served yet, or where other models are to go first."""
    status = status_of(history.workflow)
    rollout = Rollout(history, since=str(status.get("servedSince") or ""))
    before = history.known.get(str(status.get("revision") or ""))
    rollout.served = before
    draining = written(history)
    newest = history.newest
    if newest is not None and before is not newest:
        at_once = before is None or (rollout.replace and newest.identities - before.identities)
        if at_once or not lacking(newest, standings):
            rollout.served, rollout.since = newest, now
            draining = [Draining(before, now), *draining] if before is not None else draining
    rollout.since, rollout.draining = rollout.since or now, draining
    return rollout


def let_end(
    rollout: Rollout, others: Iterable[Known], standings: Mapping[str, Standing], now: str
) -> None:
    """Takes out of `rollout.draining` what has ended, or has nothing that `others`, revisions of
    other workflows, do not keep anyway."""
    in_use = [*rollout.wanted, *others]
    rollout.draining = left(rollout.draining, in_use, standings, now, replace=rollout.replace)


def lacking(known: Known, standings: Mapping[str, Standing]) -> dict[str, Standing | None]:
    """By role, the models that requests cannot use yet as this revision means them."""
    models = known.resolved.models
    return {
        role: found
        for role, found in as_used(known, standings).items()
        if found is None or not found.is_ready or not found.knows(map(key_of, models[role].loras))
    }
