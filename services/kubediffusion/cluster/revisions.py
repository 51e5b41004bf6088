# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow's revisions in a cluster: what there is, and going back to one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kubediffusion.cluster.api import Api, ApiError, Object
from kubediffusion.cluster.follow import REVISIONS, WORKFLOWS
from kubediffusion.errors import Conflict, InvalidInput, NotFound
from kubediffusion.workflow.revision import Revision, definition_of, pinned_spec, plain_spec

ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Kept:
    """One revision of a workflow; `created` is an RFC 3339 time, `changes` are fields of the spec
    in which it differs from the revision before it."""

    revision: Revision
    created: str
    served: bool
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RolledBack:
    """To which revision; `changed` is False where the workflow said so already."""

    number: int
    name: str
    changed: bool


async def history(api: Api, namespace: str, name: str) -> list[Kept]:
    """The revisions that are kept, oldest first. Raises NotFound, ApiError, ApiUnreachable."""
    workflow = await _workflow(api, namespace, name)
    found = await _revisions(api, namespace, workflow)
    served = (workflow.get("status") or {}).get("revision")
    kept: list[Kept] = []
    before: Mapping[str, Any] = {}
    for each, created in found:
        spec = (each.data.get("workflow") or {}).get("spec") or {}
        changes = differences(before, spec) if kept else ()
        kept.append(Kept(each, created, each.name == served, changes))
        before = spec
    return kept


async def roll_back(api: Api, namespace: str, name: str, to: int | None = None) -> RolledBack:
    """Writes an older revision's spec into the workflow, with the commits that it was resolved to.

    Raises InvalidInput where there is no such revision, Conflict where somebody else changes the
    workflow meanwhile, NotFound, ApiError, ApiUnreachable.
    """
    chosen: Revision | None = None
    generation: object = None
    for _ in range(ATTEMPTS):
        workflow = await _workflow(api, namespace, name)
        if chosen is None:
            found = [each for each, _ in await _revisions(api, namespace, workflow)]
            served = str((workflow.get("status") or {}).get("revision") or "")
            chosen = target(found, served, to)
            generation = workflow["metadata"].get("generation")
        elif workflow["metadata"].get("generation") != generation:
            break
        spec = pinned_spec(chosen.data)
        if plain(workflow) == spec:
            return RolledBack(chosen.number, chosen.name, changed=False)
        try:
            path = WORKFLOWS.path(namespace, name)
            await api.request("PUT", path, body={**workflow, "spec": spec})
        except ApiError as error:
            if error.status != 409:
                raise
        else:
            return RolledBack(chosen.number, chosen.name, changed=True)
    raise Conflict(f"somebody else is changing {name}; look at it, and try again")


def target(revisions: Sequence[Revision], served: str, to: int | None) -> Revision:
    """The revision to go back to: number `to`; else the one that is served, where that is not the
    newest (the newest is still on its way); else the one before the newest.

    Raises InvalidInput.
    """
    numbers = ", ".join(str(each.number) for each in revisions) or "none"
    if to is not None:
        for each in revisions:
            if each.number == to:
                return each
        raise InvalidInput(f"there is no revision {to}; kept are: {numbers}", field="--to")
    if not revisions:
        raise InvalidInput("no revision is kept yet: its sources were never resolved")
    older = revisions[:-1]
    for each in older:
        if each.name == served:
            return each
    if not older:
        raise InvalidInput(f"revision {numbers} is the only one: there is nothing to go back to")
    return older[-1]


def plain(workflow: Object) -> dict[str, Any]:
    """Its spec without defaults, as revisions have it."""
    named = {"name": workflow["metadata"]["name"]}
    whole = {"apiVersion": workflow["apiVersion"], "kind": workflow["kind"], "metadata": named}
    return plain_spec(definition_of({"format": 1, "workflow": {**whole, "spec": workflow["spec"]}}))


def differences(old: Any, new: Any, path: str = "") -> tuple[str, ...]:
    """The fields in which they differ: "pipeline.source.revision", "loras"."""
    if old == new:
        return ()
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return tuple(
            each
            for key in keys
            for each in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        )
    return (path,)


# ---------------------------------------------------------------- the API


async def _workflow(api: Api, namespace: str, name: str) -> Object:
    try:
        return await api.request("GET", WORKFLOWS.path(namespace, name))
    except ApiError as error:
        if error.status != 404:
            raise
        if "could not find the requested resource" in str(error):
            text = "this cluster has no DiffusionWorkflows: install the chart first"
            raise NotFound(text, reason="NoCrds") from None
        raise NotFound(f"there is no DiffusionWorkflow {name!r} in namespace {namespace}") from None


async def _revisions(api: Api, namespace: str, workflow: Object) -> list[tuple[Revision, str]]:
    """Its own, with their times, by number."""
    meta = workflow["metadata"]
    params = {"labelSelector": f"kubediffusion.io/workflow={meta['name']}"}
    answer = await api.request("GET", REVISIONS.path(namespace), params=params)
    mine = [
        each
        for each in answer.get("items") or ()
        if any(o.get("uid") == meta["uid"] for o in each["metadata"].get("ownerReferences") or ())
    ]
    found = [
        (
            Revision(each["metadata"]["name"], int(each["revision"]), each.get("data") or {}),
            str(each["metadata"].get("creationTimestamp", "")),
        )
        for each in mine
    ]
    return sorted(found, key=lambda pair: pair[0].number)
