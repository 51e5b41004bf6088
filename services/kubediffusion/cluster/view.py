# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a gateway makes of the cluster's objects: workflows to serve, and nodes to serve them on.

Pure. Objects are read as they come: whatever is wrong with one of them concerns that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kubediffusion.errors import InvalidWorkflow, KubeDiffusionError
from kubediffusion.workflow import ResolvedWorkflow

Object: TypeAlias = "Mapping[str, Any]"
# A ControllerRevision -> the workflow as it was resolved. Raises InvalidWorkflow.
Decode: TypeAlias = Callable[[Object], ResolvedWorkflow]

NODE_PORT = "grpc"


@dataclass(frozen=True, slots=True)
class Served:
    """A workflow at one of its revisions; `uid` is the DiffusionWorkflow's."""

    uid: str
    revision: str
    workflow: ResolvedWorkflow


@dataclass(frozen=True, slots=True)
class View:
    """`skipped` says, by workflow, why its `status.revision` is not what is served. `draining` are
    models of revisions that were served before and whose requests are ending."""

    served: Mapping[str, Served] = field(default_factory=dict[str, Served])
    addresses: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])
    draining: frozenset[str] = frozenset()

    @property
    def workflows(self) -> dict[str, ResolvedWorkflow]:
        return {name: each.workflow for name, each in self.served.items()}


def view(
    workflows: Iterable[Object],
    revisions: Iterable[Object],
    slices: Iterable[Object],
    decode: Decode,
    before: View | None = None,
) -> View:
    """The objects of one namespace, as a gateway should serve them.

    A workflow is served at its `status.revision`. Where that revision is not known yet (the watches
    run side by side) or cannot be read, the one `before` goes on, and without one the workflow is
    left out.
    """
    workflows = [each for each in workflows if "deletionTimestamp" not in each["metadata"]]
    known = {_name(revision): revision for revision in revisions}
    served: dict[str, Served] = {}
    skipped: dict[str, str] = {}
    for each in sorted(workflows, key=_name):
        name, wanted = _name(each), str((each.get("status") or {}).get("revision") or "")
        if not wanted:
            continue
        uid = str(each["metadata"].get("uid") or "")
        try:
            served[name] = Served(uid, wanted, _decoded(name, known.get(wanted), decode, wanted))
        except KubeDiffusionError as error:
            skipped[name] = f"revision {wanted}: {error}"
            old = before.served.get(name) if before is not None else None
            if old is not None and old.uid == uid:
                served[name] = old
    return View(served, addresses(slices), skipped, _draining(workflows, known, decode))


def _draining(
    workflows: Iterable[Object], known: Mapping[str, Object], decode: Decode
) -> frozenset[str]:
    """The models of revisions that drain; one that cannot be read served no request here."""
    found: set[str] = set()
    for each in workflows:
        status = each.get("status") or {}
        names = {str(entry.get("revision")) for entry in status.get("draining") or ()}
        # All that an older operator writes.
        names.add(str(status.get("previousRevision") or ""))
        for name in names & known.keys():
            with suppress(KubeDiffusionError):
                found |= {ref.identity for ref in decode(known[name]).models.values()}
    return frozenset(found)


def _decoded(name: str, revision: Object | None, decode: Decode, wanted: str) -> ResolvedWorkflow:
    if revision is None:
        raise InvalidWorkflow(f"there is no ControllerRevision {wanted} (yet)")
    workflow = decode(revision)
    if workflow.name != name:
        raise InvalidWorkflow(f"it is of another workflow, {workflow.name!r}")
    return workflow


# ---------------------------------------------------------------- nodes


def addresses(slices: Iterable[Object]) -> tuple[str, ...]:
    """Of the model nodes that EndpointSlices name, sorted: "10.0.0.7:7070", "[fd00::7]:7070".

    Terminating ones are left out, so that they end what they have; those that are not ready are in,
    for a node says itself which of its models are. A pod with two addresses is one node: its IPv4
    one counts, since two streams of a gateway to one node would end each other.
    """
    found: dict[str, tuple[str, str]] = {}
    terminating: set[str] = set()
    for each in slices:
        for key, family, address, going in _endpoints(each):
            if going:
                terminating.add(key)
            # "IPv4" comes before "IPv6".
            elif key not in found or (family, address) < found[key]:
                found[key] = (family, address)
    return tuple(sorted({a for key, (_, a) in found.items() if key not in terminating}))


def _endpoints(each: Object) -> Iterator[tuple[str, str, str, bool]]:
    """Of each endpoint of a slice: what it is, its address' family, its address, whether it is
    terminating. A slice without the nodes' port has none."""
    family = str(each.get("addressType") or "")
    ports = [port for port in each.get("ports") or () if port.get("name") == NODE_PORT]
    if family not in ("IPv4", "IPv6") or not ports or not ports[0].get("port"):
        return
    for endpoint in each.get("endpoints") or ():
        host = next(iter(endpoint.get("addresses") or ()), "")
        if not host:
            continue
        address = (
            f"[{host}]:{ports[0]['port']}" if family == "IPv6" else f"{host}:{ports[0]['port']}"
        )
        pod = endpoint.get("targetRef") or {}
        key = str(pod.get("uid") or pod.get("name") or address)
        going = (endpoint.get("conditions") or {}).get("terminating") is True
        yield key, family, address, going


def _name(each: Object) -> str:
    return str(each["metadata"]["name"])
