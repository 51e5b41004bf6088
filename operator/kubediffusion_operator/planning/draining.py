# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Revisions that are served no more, and what they keep until their requests have ended.

A gateway ends a request with the revision that it began with. So a revision's own models stay when
another one takes over, and its LoRAs stay declared on the models that both share. They go when
their drain time has passed and their nodes say that nobody uses them: no task, and no gateway for
a request that has yet to come to them. At the latest after `MOST_SECONDS`, should a node never say
so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kubediffusion_operator.planning.models import DRAIN_SECONDS, drain_seconds
from kubediffusion_operator.planning.names import items, status_of
from kubediffusion_operator.planning.residency import LoraKey, key_of
from kubediffusion_operator.planning.revisions import History, Known
from kubediffusion_operator.planning.standing import Standing

MOST_SECONDS = 1800.0
# Where the old models go before the new ones come, requests for these wait meanwhile: the old ones
# have their drain time at most, and go as soon as they are idle once gateways know of the change.
REPLACE_SECONDS = 5.0
# Nodes whose tasks are waited for are asked so often.
LOOK_SECONDS = 2.0
# More revisions than these are not kept, should a workflow be edited that often; the oldest go.
MOST_REVISIONS = 8


@dataclass(frozen=True, slots=True)
class Draining:
    """A revision, since when it is served no more, and seconds until it is looked at again. `going`
    are the models that go with it, `watched` those whose nodes have to say that they are idle."""

    known: Known
    since: str
    remaining: float | None = None
    going: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()


def written(history: History) -> list[Draining]:
    """Those in the workflow's status, the latest first; an older operator wrote one at most."""
    status = status_of(history.workflow)
    entries = list(items(status, "draining"))
    if not entries and status.get("previousRevision"):
        entries = [{"revision": status["previousRevision"], "since": status.get("servedSince")}]
    return [
        Draining(known, str(entry.get("since") or ""))
        for entry in entries
        if (known := history.known.get(str(entry["revision"]))) is not None
    ]


def as_status(draining: Iterable[Draining]) -> list[dict[str, Any]]:
    return [{"revision": each.known.revision.name, "since": each.since} for each in draining]


def left(
    draining: Iterable[Draining],
    in_use: Iterable[Known],
    standings: Mapping[str, Standing],
    now: str,
    *,
    replace: bool,
) -> list[Draining]:
    """Those that have to stay. `in_use` are the revisions that stay anyway, of any workflow."""
    keep = list(in_use)
    names = {known.revision.name for known in keep}
    found = [
        kept
        for each in draining
        if each.known.revision.name not in names
        and (kept := _kept(each, keep, standings, now, replace)) is not None
    ]
    return found[:MOST_REVISIONS]


def _kept(
    each: Draining,
    in_use: Sequence[Known],
    standings: Mapping[str, Standing],
    now: str,
    replace: bool,
) -> Draining | None:
    going, without = _lost(each.known, in_use)
    if not going and not without:
        return None
    drain = max(
        drain_seconds(standings[identity].model) if identity in standings else DRAIN_SECONDS
        for identity in going | without
    )
    least, most = (min(REPLACE_SECONDS, drain), drain) if replace else (drain, MOST_SECONDS)
    passed = seconds(now) - seconds(each.since or now)
    since = each.since or now
    if passed < least:
        return Draining(each.known, since, least - passed, going)
    busy = {
        identity
        for identity in going | without
        if identity in standings and not is_idle(standings[identity], since, least)
    }
    if not busy or passed >= max(least, most):
        return None
    return Draining(each.known, since, min(LOOK_SECONDS, most - passed), going, frozenset(busy))


def _lost(known: Known, in_use: Sequence[Known]) -> tuple[frozenset[str], frozenset[str]]:
    """Models that only `known` has, and those that stay, but without some LoRA of it."""
    stay = frozenset[str]().union(*(each.identities for each in in_use))
    declared = frozenset[tuple[str, LoraKey]]().union(*(loras_of(each) for each in in_use))
    without = frozenset(identity for identity, _ in loras_of(known) - declared)
    return known.identities - stay, without & stay


def loras_of(known: Known) -> frozenset[tuple[str, LoraKey]]:
    """By the identity of the model that they are declared on."""
    models = known.resolved.models.values()
    return frozenset((ref.identity, key_of(lora)) for ref in models for lora in ref.loras)


def is_idle(found: Standing, since: str, least: float) -> bool:
    """All its nodes said, after the gateways knew of the change, that no task uses it, and that no
    gateway needs it for one that is to come. A node or a gateway of an older version does not say;
    then the time has to do."""
    for _, report in found.nodes:
        if report is None or report.error or not report.answered:
            return False
        if seconds(report.answered) < seconds(since) + least:
            return False
        of_it = (said for said in report.models if said.identity == found.name)
        if any(said.tasks or said.needed for said in of_it):
            return False
    return True


def seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
