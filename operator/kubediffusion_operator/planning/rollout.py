# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which revision of a workflow the gateways serve, and when the one before has done its part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from kubediffusion_operator.planning.models import DRAIN_SECONDS, drain_seconds
from kubediffusion_operator.planning.names import status_of
from kubediffusion_operator.planning.revisions import History, Known
from kubediffusion_operator.planning.standing import Standing


@dataclass(slots=True)
class Rollout:
    """`served` is what gateways are told; `previous` is still in use by requests that it got."""

    history: History
    served: Known | None = None
    previous: Known | None = None
    since: str = ""
    # Seconds until the previous one has had its time.
    remaining: float | None = None

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
    def in_use(self) -> list[Known]:
        """The newest first; each once."""
        found = {
            known.revision.name: known
            for known in (self.newest, self.served, self.previous)
            if known is not None
        }
        return list(found.values())

    @property
    def roles(self) -> dict[str, str]:
        """The newest revision's models: role to identity, sorted."""
        if self.newest is None:
            return {}
        models = self.newest.resolved.models
        return {role: models[role].identity for role in sorted(models)}


def rolled(history: History, standings: Mapping[str, Standing], now: str) -> Rollout:
    """The newest is served when all its models are Ready; at once where nothing is served yet, or
    where the old ones are to go first."""
    status = status_of(history.workflow)
    rollout = Rollout(history, since=str(status.get("servedSince") or ""))
    before = history.known.get(str(status.get("revision") or ""))
    rollout.served = before
    if history.newest is None:
        return rollout
    at_once = before is None or rollout.replace
    if before is not history.newest and (at_once or _all_ready(history.newest, standings)):
        rollout.served, rollout.previous, rollout.since = history.newest, before, now
    else:
        rollout.previous = history.known.get(str(status.get("previousRevision") or ""))
    rollout.since = rollout.since or now
    _let_end(rollout, standings, now)
    return rollout


def _all_ready(known: Known, standings: Mapping[str, Standing]) -> bool:
    return all(i in standings and standings[i].is_ready for i in known.identities)


def _let_end(rollout: Rollout, standings: Mapping[str, Standing], now: str) -> None:
    """The previous revision's own models stay for their drain time: requests that were taken before
    the gateways heard of the change end on them."""
    if rollout.previous is None:
        return
    going = rollout.previous.identities
    for known in (rollout.newest, rollout.served):
        going -= known.identities if known else frozenset()
    drains = [
        drain_seconds(standings[identity].model) if identity in standings else DRAIN_SECONDS
        for identity in going
    ]
    passed = _seconds(now) - _seconds(rollout.since)
    remaining = max(drains, default=0) - passed
    if rollout.replace or remaining <= 0:
        rollout.previous = None
    else:
        rollout.remaining = remaining


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
