# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow's revisions: which is the newest, which is served, which are kept.

A revision is made when a workflow's spec changes. Its weights are looked up when it names a source
that the revision before did not; an edit of anything else keeps the commits that are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kubediffusion.api.load import broken_rules, format_path
from kubediffusion.api.workflow import DiffusionWorkflow
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow import (
    ResolvedWorkflow,
    Revision,
    decode,
    encode,
    revision_name,
)
from kubediffusion.workflow.revision import Pins, definition_of, pins_of, plain_spec, same_sources
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.conditions import Condition
from kubediffusion_operator.planning.diff import stamped
from kubediffusion_operator.planning.names import (
    MANAGED_BY,
    OURS,
    WORKFLOW,
    controller_of,
    generation_of,
    is_going,
    labels_of,
    name_of,
    owner_reference,
    part,
    ref_of,
    uid_of,
)
from kubediffusion_operator.planning.types import (
    Object,
    Observed,
    Ref,
    Resolution,
    ResolutionError,
)

RESOLVED = "Resolved"


@dataclass(frozen=True, slots=True)
class Known:
    """A revision and what it says: the workflow as written, and as it was resolved."""

    revision: Revision
    definition: DiffusionWorkflow
    resolved: ResolvedWorkflow

    @property
    def identities(self) -> frozenset[str]:
        return frozenset(ref.identity for ref in self.resolved.models.values())


@dataclass(slots=True)
class History:
    """One workflow and its revisions. `newest` is what it should serve, once that is Ready."""

    workflow: Object
    newest: Known | None
    # Readable revisions by name, `newest` among them, though it may not be written yet.
    known: Mapping[str, Known]
    condition: Condition
    # Its ControllerRevisions, those that cannot be read too.
    written: Sequence[Object]
    # A ControllerRevision to write; the workflow, where its sources have to be read.
    write: Object | None = None
    resolve: bool = False

    @property
    def top(self) -> int:
        """The highest number given so far."""
        return max((int(found.get("revision") or 0) for found in self.written), default=0)


def by_workflow(observed: Observed) -> Mapping[str, Sequence[Object]]:
    """ControllerRevisions by the uid of their workflow."""
    found: dict[str, list[Object]] = {}
    for revision in observed.revisions.values():
        if not is_going(revision):
            found.setdefault(controller_of(revision), []).append(revision)
    return found


def surplus(history: History, in_use: frozenset[str]) -> list[Ref]:
    """Old revisions beyond the workflow's limit, the oldest first; never one that is in use."""
    limit = int(history.workflow["spec"].get("revisionHistoryLimit", 10))
    old = sorted(
        (found for found in history.written if name_of(found) not in in_use),
        key=lambda found: (int(found.get("revision") or 0), name_of(found)),
    )
    return [ref_of(found) for found in old[: max(0, len(old) - limit)]]


def orphans(observed: Observed) -> list[Ref]:
    """Revisions that nobody owns any more, not even an object that is gone."""
    return [
        ref_of(found)
        for found in observed.revisions.values()
        if labels_of(found).get(MANAGED_BY) == OURS
        and not controller_of(found)
        and not is_going(found)
    ]


def history(
    workflow: Object, revisions: Sequence[Object], observed: Observed, cache: PlanCache
) -> History:
    """A workflow's; `revisions` are its ControllerRevisions."""
    known = {
        each.revision.name: each
        for found in revisions
        if (each := _known(found, cache)) is not None
    }
    newest = max(known.values(), key=lambda each: each.revision.number, default=None)
    found = History(workflow, newest, known, _RESOLVING, revisions)
    definition = _definition(workflow, cache)
    if isinstance(definition, InvalidWorkflow):
        found.condition = _unresolved(definition)
        return found
    spec = _plain(workflow, definition, cache)
    if newest is not None and newest.revision.data["workflow"]["spec"] == spec:
        found.condition = _resolved(newest)
        return found
    pins = _pins(workflow, definition, newest, observed)
    if not isinstance(pins, Pins):
        return _waiting(found, pins)
    return _advanced(found, definition, pins, cache)


_RESOLVING = Condition(RESOLVED, "Unknown", "Resolving", "its sources are being looked up")


def _waiting(history: History, error: ResolutionError | None) -> History:
    history.resolve = error is None or error.due
    if error is not None:
        text = f"{error.field}: {error.message}" if error.field else error.message
        history.condition = Condition(RESOLVED, "False", error.reason, text, event="Warning")
    return history


def _advanced(
    history: History, definition: DiffusionWorkflow, pins: Pins, cache: PlanCache
) -> History:
    """With a new revision, or an old one that becomes the newest; or why there cannot be one."""
    workflow, known = history.workflow, history.known
    try:
        made = cache.get(
            ("revision", uid_of(workflow), generation_of(workflow), _fingerprint(pins)),
            lambda: _made(name_of(workflow), definition, pins),
        )
    except InvalidWorkflow as error:
        history.condition = _unresolved(error)
        return history
    name, data, resolved = made
    cache.get(("decoded", name), lambda: (definition, resolved))
    revision = Revision(name, history.top + 1, data)
    newest = Known(revision, definition, resolved)
    history.newest, history.known = newest, {**known, name: newest}
    history.condition = _resolved(newest)
    history.write = _object(workflow, revision)
    return history


def _made(
    name: str, definition: DiffusionWorkflow, pins: Pins
) -> tuple[str, dict[str, Any], ResolvedWorkflow]:
    data = encode(definition, pins.index, pins.commits)
    return revision_name(name, data), data, decode(data)


def _fingerprint(pins: Pins) -> tuple[object, ...]:
    index = pins.index
    commits = tuple(sorted(pins.commits.items()))
    return index.commit, tuple(sorted(index.components.items())), commits


def _pins(
    workflow: Object, definition: DiffusionWorkflow, newest: Known | None, observed: Observed
) -> Pins | ResolutionError | None:
    if newest is not None and same_sources(newest.definition, definition):
        return pins_of(newest.revision.data)
    found = observed.resolutions.get((uid_of(workflow), generation_of(workflow)))
    return Pins(found.index, found.commits) if isinstance(found, Resolution) else found


def _known(found: Object, cache: PlanCache) -> Known | None:
    """None where it cannot be read; then it is as if it were not there."""
    name, number = name_of(found), int(found.get("revision") or 0)
    # Its data never changes, its number does. Of data that its name is the hash of, the name will
    # do, and the revision that was just made is known already.
    told = cache.get(("hash", name, uid_of(found)), lambda: _is_hash(found))
    key = ("decoded", name) if told else ("decoded", name, uid_of(found))
    said = cache.get(key, lambda: _decoded(part(found, "data")))
    if said is None:
        return None
    return Known(Revision(name, number, part(found, "data")), *said)


def _is_hash(found: Object) -> bool:
    data = part(found, "data")
    workflow = part(part(data, "workflow"), "metadata").get("name", "")
    return name_of(found) == revision_name(str(workflow), data)


def _decoded(data: Mapping[str, Any]) -> tuple[DiffusionWorkflow, ResolvedWorkflow] | None:
    try:
        return definition_of(data), decode(data)
    except InvalidWorkflow:
        return None


def _definition(workflow: Object, cache: PlanCache) -> DiffusionWorkflow | InvalidWorkflow:
    key = ("definition", uid_of(workflow), generation_of(workflow))
    return cache.get(key, lambda: _parsed(workflow))


def _plain(workflow: Object, definition: DiffusionWorkflow, cache: PlanCache) -> object:
    key = ("spec", uid_of(workflow), generation_of(workflow))
    return cache.get(key, lambda: plain_spec(definition))


def _parsed(workflow: Object) -> DiffusionWorkflow | InvalidWorkflow:
    """The API server has checked it; but perhaps by the CRD of another version."""
    content = {
        "apiVersion": workflow["apiVersion"],
        "kind": workflow["kind"],
        "metadata": {"name": name_of(workflow)},
        "spec": workflow.get("spec") or {},
    }
    try:
        definition = DiffusionWorkflow.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return InvalidWorkflow(first["msg"], field=format_path(tuple(first["loc"])))
    broken = next(iter(broken_rules(definition)), None)
    if broken is not None:
        return InvalidWorkflow(broken.message, field=format_path(broken.path))
    return definition


def _object(workflow: Object, revision: Revision) -> Object:
    return stamped(
        {
            "apiVersion": "apps/v1",
            "kind": "ControllerRevision",
            "metadata": {
                "name": revision.name,
                "labels": {MANAGED_BY: OURS, WORKFLOW: name_of(workflow)},
                "ownerReferences": [owner_reference(workflow, controller=True)],
            },
            "revision": revision.number,
            "data": revision.data,
        }
    )


def _resolved(newest: Known) -> Condition:
    commit = newest.revision.data["index"]["commit"]
    at = f" at commit {commit[:12]}" if commit else ""
    count = len(newest.resolved.models)
    return Condition(RESOLVED, "True", "Resolved", f"{count} models of its pipeline{at}")


def _unresolved(error: InvalidWorkflow) -> Condition:
    return Condition(RESOLVED, "False", error.reason, str(error), event="Warning")
