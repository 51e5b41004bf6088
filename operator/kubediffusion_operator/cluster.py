# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the operator knows of the cluster: every object it watches, in memory, as plain dicts.

Watches bring the objects. What we write ourselves is taken over from the API server's answer at
once, so that the next plan sees it: an older event of the watch that is still under way does not
undo it, and what the watch does not confirm within `EXPECTATION_SECONDS` is believed no longer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kubediffusion.cluster.api import Api, Object
from kubediffusion.cluster.watch import Change, Watch
from kubediffusion_operator.kinds import WATCHED, Watched

EXPECTATION_SECONDS = 30.0
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

Key = tuple[str, str, str]  # kind, namespace, name


@dataclass(frozen=True, slots=True)
class _Written:
    """What the API server answered to a write of ours; `object` is None after a deletion."""

    object: Object | None
    uid: str
    until: float


class Cluster:
    """Objects by kind, namespace and name. Whoever reads must not change them.

    `on_change` gets the namespace of every object that is new, different or gone; not for what
    `wrote` and `deleted` bring.
    """

    def __init__(
        self,
        on_change: Callable[[str], None],
        *,
        now: Callable[[], float],
        kinds: Sequence[Watched] = WATCHED,
    ) -> None:
        self._on_change = on_change
        self._now = now
        self._kinds = kinds
        self._objects: dict[str, dict[str, dict[str, Object]]] = {
            each.kind: defaultdict(dict) for each in kinds
        }
        self._written: dict[Key, _Written] = {}
        self.watches: dict[str, Watch] = {}

    # ------------------------------------------------------------ reading

    def objects(self, kind: str, namespace: str) -> Mapping[str, Object]:
        """Of one kind in one namespace, by name: a live view."""
        return self._objects[kind].get(namespace, {})

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self.objects(kind, namespace).get(name)

    def workflows(self, namespace: str) -> Mapping[str, Object]:
        return self.objects("DiffusionWorkflow", namespace)

    def models(self, namespace: str) -> Mapping[str, Object]:
        return self.objects("DiffusionModel", namespace)

    def pools(self, namespace: str) -> Mapping[str, Object]:
        return self.objects("ModelPool", namespace)

    def revisions(self, namespace: str) -> Mapping[str, Object]:
        return self.objects("ControllerRevision", namespace)

    def deployments(self, namespace: str) -> Mapping[str, Object]:
        return self.objects("Deployment", namespace)

    def pods(self, namespace: str) -> Mapping[str, Object]:
        return self.objects("Pod", namespace)

    def namespaces(self) -> set[str]:
        """Those that hold anything of ours."""
        return {
            namespace
            for spaces in self._objects.values()
            for namespace, objects in spaces.items()
            if objects
        }

    def readiness(self, kind: str) -> tuple[int, int]:
        """How many of all namespaces' objects have the condition Ready, and how many do not."""
        found = [each for space in self._objects[kind].values() for each in space.values()]
        ready = sum(_is_ready(each) for each in found)
        return ready, len(found) - ready

    # ------------------------------------------------------------ watching

    def watch(self, api: Api, namespace: str = "") -> Mapping[str, Watch]:
        """Watches by kind, of all namespaces where none is given. The caller runs them."""
        for each in self._kinds:
            self.watches[each.kind] = Watch(
                api,
                each.collection,
                namespace=namespace,
                label_selector=each.selector,
                on_change=lambda change, kind=each.kind: self._changed(kind, change),
            )
        return self.watches

    async def wait_synced(self) -> None:
        for watch in self.watches.values():
            await watch.synced.wait()

    def _changed(self, kind: str, change: Change) -> None:
        _trim(change.object)
        meta = change.object["metadata"]
        namespace, name = str(meta.get("namespace") or ""), str(meta["name"])
        key = (kind, namespace, name)
        if not self._supersedes(change, self._written.get(key)):
            return
        self._written.pop(key, None)
        if self._put(key, change.new):
            self._on_change(namespace)

    @staticmethod
    def _supersedes(change: Change, written: _Written | None) -> bool:
        """Whether what a watch says is at least as new as what we wrote."""
        if written is None:
            return True
        same = change.object["metadata"].get("uid") == written.uid
        if change.new is None:
            # The end of an older object of that name is not the end of the one that we made.
            return same
        if written.object is None:
            return not same
        return not same or version(change.new) >= version(written.object)

    def _put(self, key: Key, found: Object | None) -> bool:
        """Takes it over; whether anything is different."""
        kind, namespace, name = key
        spaces = self._objects[kind]
        old = spaces.get(namespace, {}).get(name)
        if found is not None:
            spaces[namespace][name] = found
            return old is None or identity(old) != identity(found)
        if old is not None:
            del spaces[namespace][name]
            if not spaces[namespace]:
                del spaces[namespace]
        return old is not None

    # ------------------------------------------------------------ our own writes

    def wrote(self, answer: Object) -> None:
        """The API server's answer to a write of ours."""
        kind = str(answer["kind"])
        if kind not in self._objects:
            return
        _trim(answer)
        meta = answer["metadata"]
        key = (kind, str(meta.get("namespace") or ""), str(meta["name"]))
        known = self.get(*key)
        same = known is not None and known["metadata"].get("uid") == meta.get("uid")
        if same and known is not None and version(known) >= version(answer):
            return
        self._written[key] = _Written(answer, str(meta.get("uid")), self._expiry())
        self._put(key, answer)

    def deleted(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """The API server has said that it is gone."""
        key = (kind, namespace, name)
        known = self.get(*key)
        if known is not None and known["metadata"].get("uid") == uid:
            self._written[key] = _Written(None, uid, self._expiry())
            self._put(key, None)

    def expire(self) -> None:
        """To be called now and then: what no watch has confirmed is believed no longer."""
        now = self._now()
        for key in [key for key, written in self._written.items() if written.until < now]:
            del self._written[key]
            kind, namespace, name = key
            truth = self.watches[kind].objects.get((namespace, name)) if self.watches else None
            if self._put(key, truth):
                self._on_change(namespace)

    def _expiry(self) -> float:
        return self._now() + EXPECTATION_SECONDS


def version(found: Mapping[str, Any]) -> int:
    """Of one collection's objects the newer has the larger one."""
    try:
        return int(found["metadata"].get("resourceVersion") or 0)
    except ValueError:  # not of an API server that we know: any event counts as new
        return 0


def identity(found: Mapping[str, Any]) -> tuple[str, str]:
    meta = found["metadata"]
    return str(meta.get("uid")), str(meta.get("resourceVersion"))


def _is_ready(found: Mapping[str, Any]) -> bool:
    conditions = (found.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def _trim(found: Object) -> None:
    """Without what nobody here reads and what would double the memory."""
    meta = found["metadata"]
    meta.pop("managedFields", None)
    annotations = meta.get("annotations")
    if annotations:
        annotations.pop(LAST_APPLIED, None)
