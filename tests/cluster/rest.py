# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A small client of the Kubernetes API for tests: plain dicts, and waits made of watches."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

Object = dict[str, Any]
Objects = list[Object]

_PATCHES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}
# One request tells all resources of a group list.
_DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"


class ApiError(Exception):
    """The API server refused. `status` is HTTP's, `reason` and `message` Kubernetes'."""

    def __init__(self, response: httpx.Response) -> None:
        response.read()
        self.status = response.status_code
        try:
            self.body: Object = response.json()
        except ValueError:
            self.body = {"message": response.text}
        self.reason: str = self.body.get("reason", "")
        self.message: str = self.body.get("message", "")
        super().__init__(f"{self.status} {self.reason}: {self.message}")


@dataclass(frozen=True)
class Resource:
    """Where objects of one kind are. `api_version` is ``v1`` or ``GROUP/VERSION``."""

    api_version: str
    plural: str
    kind: str
    namespaced: bool

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        parts = ["api" if "/" not in self.api_version else "apis", self.api_version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        return "/" + "/".join([*parts, self.plural, *filter(None, (name, subresource))])


class Kube:
    """One user's view of the API. Synchronous and safe for threads.

    `kind` is a kind, a plural or a short name (``Deployment``, ``pods``, ``dwf``), or
    ``GROUP/VERSION/Kind`` where two groups have it. Without `namespace` the client's own is meant;
    ``namespace="*"`` lists and watches all. Everything raises ApiError where the server refuses.
    """

    def __init__(self, server: str, ca: Path, token: str, namespace: str = "default") -> None:
        self.server, self.ca, self.token, self.namespace = server, ca, token, namespace
        self._http = httpx.Client(
            base_url=server,
            verify=ssl.create_default_context(cafile=str(ca)),
            headers={"Authorization": f"Bearer {token}", "User-Agent": "tests"} if token else {},
            timeout=30.0,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=False,
        )
        self._known: dict[str, Resource] = {}

    def acting_as(self, token: str) -> Kube:
        """The same server for another user; an empty token is nobody."""
        return Kube(self.server, self.ca, token, self.namespace)

    def within(self, namespace: str) -> Kube:
        """The same user with another namespace of its own."""
        return Kube(self.server, self.ca, self.token, namespace)

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Any request; the answer's JSON, or its text where it is none."""
        response = self._http.request(method, path, **options)
        if response.is_error:
            raise ApiError(response)
        if "json" in response.headers.get("content-type", ""):
            return response.json()
        return response.text

    # One object

    def get(
        self, kind: str, name: str, namespace: str | None = None, subresource: str = ""
    ) -> Object:
        return self.request("GET", self._path(kind, namespace, name, subresource))

    def find(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """As `get`; None where there is none."""
        try:
            return self.get(kind, name, namespace)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def create(
        self, body: Object, namespace: str | None = None, dry_run: bool = False, **params: str
    ) -> Object:
        resource = self.resource(f"{body['apiVersion']}/{body['kind']}")
        namespace = body.get("metadata", {}).get("namespace") or namespace or self.namespace
        query = {**params, **({"dryRun": "All"} if dry_run else {})}
        return self.request("POST", resource.path(namespace), json=body, params=query)

    def apply(
        self,
        body: Object,
        namespace: str | None = None,
        *,
        manager: str = "tests",
        force: bool = True,
        subresource: str = "",
    ) -> Object:
        """Server-side apply."""
        path = self._path_of(body, namespace, subresource)
        return self.request(
            "PATCH",
            path,
            content=json.dumps(body),
            params={"fieldManager": manager, "force": str(force).lower()},
            headers={"Content-Type": "application/apply-patch+yaml"},
        )

    def replace(self, body: Object, namespace: str | None = None, subresource: str = "") -> Object:
        """PUT; a conflict (409) where `body` has an old resourceVersion."""
        return self.request("PUT", self._path_of(body, namespace, subresource), json=body)

    def patch(
        self,
        kind: str,
        name: str,
        patch: Any,
        namespace: str | None = None,
        *,
        subresource: str = "",
        how: str = "merge",
    ) -> Object:
        """`how`: ``merge``, ``json`` or ``strategic``."""
        return self.request(
            "PATCH",
            self._path(kind, namespace, name, subresource),
            content=json.dumps(patch),
            headers={"Content-Type": _PATCHES[how]},
        )

    def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        propagation: str = "Background",
        missing_ok: bool = False,
        grace_seconds: int | None = None,
    ) -> None:
        options: Object = {"propagationPolicy": propagation}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            self.request("DELETE", self._path(kind, namespace, name), json=options)
        except ApiError as error:
            if not (missing_ok and error.status == 404):
                raise

    # Several objects

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> Objects:
        """`selector` is a label selector."""
        return self._list(kind, namespace, {"labelSelector": selector})[0]

    def watch(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        timeout: float,
        since: str = "",
        **query: str,
    ) -> Iterator[tuple[str, Object]]:
        """(ADDED | MODIFIED | DELETED | ERROR, object), until the server or `timeout` ends it."""
        params = {**query, "watch": "true", "resourceVersion": since}
        end = time.monotonic() + timeout
        path = self._path(kind, namespace)
        limits = httpx.Timeout(30.0, read=max(timeout, 0.01))
        try:
            with self._http.stream("GET", path, params=params, timeout=limits) as response:
                if response.is_error:
                    raise ApiError(response)
                for line in response.iter_lines():
                    event = json.loads(line)
                    yield event["type"], event["object"]
                    limits.read = max(end - time.monotonic(), 0.01)
        except httpx.ReadTimeout:
            return

    def wait_for(
        self,
        kind: str,
        name: str,
        predicate: Callable[[Object], Any] = bool,
        namespace: str | None = None,
        timeout: float = 30.0,
    ) -> Object:
        """The object once it is there and `predicate` of it is true; at once where it is already.

        Raises TimeoutError, which shows the last state seen.
        """

        def fits(objects: Objects) -> bool:
            return bool(objects) and bool(predicate(objects[0]))

        fields = {"fieldSelector": f"metadata.name={name}"}
        return self._wait(kind, namespace, fields, fits, timeout, f"{kind} {name}")[0]

    def wait_gone(
        self, kind: str, name: str, namespace: str | None = None, timeout: float = 30.0
    ) -> None:
        fields = {"fieldSelector": f"metadata.name={name}"}
        end = f"the end of {kind} {name}"
        self._wait(kind, namespace, fields, lambda objects: not objects, timeout, end)

    def wait_all(
        self,
        kind: str,
        predicate: Callable[[Objects], Any],
        namespace: str | None = None,
        *,
        selector: str = "",
        timeout: float = 30.0,
    ) -> Objects:
        """All objects that `selector` finds, once `predicate` of their list is true."""
        query = {"labelSelector": selector}
        return self._wait(kind, namespace, query, predicate, timeout, f"all {kind} {selector}")

    # What the kinds are

    def resource(self, kind: str) -> Resource:
        """Raises KeyError where the API server does not know it (5 s after a CRD came)."""
        end = time.monotonic() + 5.0
        while kind.lower() not in self._known:
            self._known = self._discover()
            if kind.lower() not in self._known and time.monotonic() > end:
                raise KeyError(f"the API server has no {kind}")
        return self._known[kind.lower()]

    def _discover(self) -> dict[str, Resource]:
        known: dict[str, Resource] = {}
        for root in ("/api", "/apis"):
            groups = self.request("GET", root, headers={"Accept": _DISCOVERY})["items"]
            for group in groups:
                for version in group["versions"]:
                    prefix = group["metadata"].get("name", "")
                    api_version = f"{prefix}/{version['version']}" if prefix else version["version"]
                    for entry in version.get("resources", ()):
                        _remember(known, api_version, entry)
        return known

    def _path(self, kind: str, namespace: str | None, name: str = "", subresource: str = "") -> str:
        chosen = None if namespace == "*" else namespace or self.namespace
        return self.resource(kind).path(chosen, name, subresource)

    def _path_of(self, body: Object, namespace: str | None, subresource: str) -> str:
        meta = body["metadata"]
        kind = f"{body['apiVersion']}/{body['kind']}"
        return self._path(kind, meta.get("namespace") or namespace, meta["name"], subresource)

    # Waiting

    def _list(self, kind: str, namespace: str | None, query: dict[str, str]) -> tuple[Objects, str]:
        resource = self.resource(kind)
        answer = self.request("GET", self._path(kind, namespace), params=query)
        about = {"apiVersion": resource.api_version, "kind": resource.kind}
        return [{**about, **item} for item in answer["items"]], answer["metadata"][
            "resourceVersion"
        ]

    def _wait(
        self,
        kind: str,
        namespace: str | None,
        query: dict[str, str],
        predicate: Callable[[Objects], Any],
        timeout: float,
        what: str,
    ) -> Objects:
        end = time.monotonic() + timeout
        last: Objects = []
        while (left := end - time.monotonic()) > 0:
            try:
                for last in self._states(kind, namespace, query, left):
                    if predicate(last):
                        return last
            except httpx.TransportError:
                # The API server is away: tests stop it. There is no event to wait for.
                time.sleep(0.05)
            except ApiError as error:
                if error.status not in (410, 429, 500, 503, 504):
                    raise
                time.sleep(0.05)
        shown = json.dumps([_brief(state) for state in last], indent=1)[-6000:]
        raise TimeoutError(f"waited {timeout:g} s for {what}; last seen:\n{shown}")

    def _states(
        self, kind: str, namespace: str | None, query: dict[str, str], timeout: float
    ) -> Iterator[Objects]:
        """The objects now, and again after each change, until the watch ends."""
        objects, since = self._list(kind, namespace, query)
        by_name = {_key(item): item for item in objects}
        yield list(by_name.values())
        for event, item in self.watch(kind, namespace, timeout=timeout, since=since, **query):
            if event == "ERROR":
                return
            if event == "DELETED":
                by_name.pop(_key(item), None)
            else:
                by_name[_key(item)] = item
            yield list(by_name.values())


class AsyncKube:
    """`Kube` for tests in an event loop: the same methods, each awaited (in a thread)."""

    def __init__(self, kube: Kube) -> None:
        self.sync = kube

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.sync, name)

        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(method, *args, **options)

        return call


def condition(item: Object, kind: str) -> Object:
    """The condition of that type; an empty one where it is missing."""
    # A CRD that has just been made says null.
    conditions = item.get("status", {}).get("conditions") or ()
    return next((one for one in conditions if one["type"] == kind), {})


def is_true(kind: str) -> Callable[[Object], bool]:
    """A predicate for `wait_for`: condition `kind` is True, and of the newest generation."""

    def check(item: Object) -> bool:
        found = condition(item, kind)
        generation = item["metadata"].get("generation")
        current = found.get("observedGeneration", generation) == generation
        return found.get("status") == "True" and current

    return check


def _remember(known: dict[str, Resource], api_version: str, entry: Object) -> None:
    kind = entry["responseKind"]["kind"]
    # The subresources' own kinds (Scale, Eviction) are under entry["subresources"].
    resource = Resource(api_version, entry["resource"], kind, entry["scope"] == "Namespaced")
    names = [
        kind,
        entry["resource"],
        entry.get("singularResource", ""),
        *entry.get("shortNames", ()),
    ]
    known[f"{api_version}/{kind}".lower()] = resource
    for name in filter(None, names):
        known.setdefault(name.lower(), resource)


def _key(item: Object) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _brief(item: Object) -> Object:
    meta = {key: item["metadata"].get(key) for key in ("name", "generation", "deletionTimestamp")}
    return {"metadata": meta, "spec": item.get("spec"), "status": item.get("status")}
