# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API in plain dicts: one call, and one stream of watch events.

Only the transport of the official client is used (TLS, kubeconfig, tokens that are renewed): its
typed models cost tens of megabytes, and objects of ours have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias
from urllib.parse import quote

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from kubediffusion.errors import InvalidInput, KubeDiffusionError, Unavailable

Object: TypeAlias = dict[str, Any]

CALL_SECONDS = 30.0
CONNECT_SECONDS = 10.0
JSON = "application/json"
APPLY_PATCH = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
_DEFAULT = "~/.kube/config"
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiError(Unavailable):
    """The API server's refusal; `status` is its HTTP code, `reason` its CamelCase word.

    `retry_after` is in seconds, 0 where the server asked for no pause.
    """

    def __init__(
        self, message: str, *, status: int, reason: str = "", retry_after: float = 0.0
    ) -> None:
        super().__init__(message, reason=reason)
        self.status = status
        self.retry_after = retry_after


class ApiUnreachable(Unavailable):
    reason = "ApiServerUnreachable"


@dataclass(frozen=True, slots=True)
class Kind:
    """A collection of the API: ``Kind("apps/v1", "controllerrevisions")``."""

    api_version: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Of one object, or of all; without a namespace those of every namespace."""
        root = "/apis/" if "/" in self.api_version else "/api/"
        within = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
        rest = "".join(f"/{quote(part, safe='')}" for part in (name, subresource) if part)
        return f"{root}{self.api_version}{within}/{self.plural}{rest}"


class Api:
    """One API server. An async context manager; safe for many tasks of one event loop."""

    def __init__(self, client: ApiClient, namespace: str = "default") -> None:
        self.namespace = namespace
        self._client = client

    @classmethod
    async def connect(cls, *, kubeconfig: str = "", context: str = "") -> Self:
        """By the kubeconfig, as kubectl finds it; in a pod by its service account.

        `namespace` is then the context's, or the pod's own. Raises InvalidInput where there is no
        configuration or it makes no sense; the server is not asked yet.
        """
        configuration = Configuration()
        try:
            namespace = await _configure(configuration, kubeconfig, context)
        except kube_config.ConfigException as error:
            raise InvalidInput(
                f"no way to the cluster: {error}; pass --kubeconfig, set KUBECONFIG, or run in a "
                "pod with a service account",
                field="kubeconfig",
                reason="NoCluster",
            ) from None
        return cls(ApiClient(configuration), namespace)

    @property
    def configuration(self) -> Configuration:
        """Where the server is and who we are, for other libraries."""
        return self._client.configuration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = JSON,
        timeout: float = CALL_SECONDS,  # noqa: ASYNC109 (of the transport)
    ) -> Object:
        """One call and its JSON answer. Raises ApiError, ApiUnreachable."""
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)
        async with self._open(method, path, params, body, content_type, limits) as response:
            return await response.json()

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, str], *, silence: float
    ) -> AsyncIterator[AsyncIterator[Object]]:
        """The events of a watch. Raises ApiError, ApiUnreachable: that too after `silence`
        seconds without a byte, and for a line that was torn off."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        async with self._open("GET", path, params, None, JSON, limits) as response:

            async def lines() -> AsyncIterator[Object]:
                async for line in response.content:
                    if line.strip():
                        yield json.loads(line)

            yield lines()

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: Object | None,
        content_type: str,
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        response: aiohttp.ClientResponse | None = None
        try:
            call = await self._client.param_serialize(
                method,
                path,
                query_params=list((params or {}).items()),
                header_params={"Accept": JSON, "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._client.call_api(*call, _request_timeout=limits)
            response = answer.response
            assert response is not None
            if response.status >= 400:
                raise _refusal(method, path, response, await response.text())
            yield response
        except (aiohttp.ClientError, OSError, ValueError) as error:
            host = self._client.configuration.host
            text = str(error) or type(error).__name__
            raise ApiUnreachable(f"{host}: {method} {path}: {text}") from error
        finally:
            if response is not None:
                response.close()


def _refusal(method: str, path: str, response: aiohttp.ClientResponse, text: str) -> ApiError:
    status = response.status
    try:
        answer = json.loads(text)
        message, reason = answer.get("message", ""), answer.get("reason", "")
    except (ValueError, AttributeError):
        message, reason = text.strip()[:500], ""
    message = message or f"HTTP {status}"
    try:
        pause = max(0.0, float(response.headers.get("Retry-After", "0")))
    except ValueError:  # a date; no API server sends one
        pause = 0.0
    return ApiError(
        f"{method} {path}: {message}",
        status=status,
        reason=reason or f"Http{status}",
        retry_after=pause,
    )


def error_of(event: Object) -> KubeDiffusionError:
    """What an ERROR event of a watch says."""
    status = event.get("object") or {}
    return ApiError(
        str(status.get("message") or "the watch failed"),
        status=int(status.get("code") or 500),
        reason=str(status.get("reason") or "WatchFailed"),
    )


async def _configure(configuration: Configuration, kubeconfig: str, context: str) -> str:
    """Fills it in; returns the namespace that commands without one mean."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    named = kubeconfig or os.environ.get("KUBECONFIG", "")
    if in_pod and not named and not context:
        kube_config.load_incluster_config(client_configuration=configuration)
        return _pod_namespace()
    _check_there(named or _DEFAULT)
    await kube_config.load_kube_config(
        config_file=named or None,
        context=context or None,
        client_configuration=configuration,
        persist_config=False,
    )
    return _namespace_of(named, context)


def _check_there(paths: str) -> None:
    files = [os.path.expanduser(path) for path in paths.split(os.pathsep)]
    if not any(map(os.path.exists, files)):
        raise kube_config.ConfigException(f"there is no {' or '.join(files)}")


def _pod_namespace() -> str:
    try:
        return _POD_NAMESPACE.read_text().strip() or "default"
    except OSError:
        return "default"


def _namespace_of(kubeconfig: str, context: str) -> str:
    """The namespace of a kubeconfig's context; the current one's where none is named."""
    found: Any = kube_config.list_kube_config_contexts(kubeconfig or None)
    contexts, current = found
    chosen = next((each for each in contexts if each["name"] == context), current)
    return (chosen.get("context") or {}).get("namespace") or "default"
