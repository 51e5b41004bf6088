# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Instant queries to a Prometheus, or to anything that speaks its HTTP API."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import BaseModel, ValidationError

from kubediffusion.errors import InvalidInput, Unavailable
from kubediffusion_operator.config import Prometheus as Configured


class PrometheusUnavailable(Unavailable):
    """No usable answer. `reason` is PrometheusUnreachable, PrometheusTimeout, PrometheusRefused,
    QueryFailed or PrometheusNonsense. Equal failures have equal messages: they become conditions.
    """

    reason = "PrometheusUnreachable"


@dataclass(frozen=True, slots=True)
class Sample:
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A vector. With `warnings` it may be a part of one: a store behind it did not answer, say."""

    samples: tuple[Sample, ...]
    warnings: tuple[str, ...] = ()


class _Series(BaseModel):
    metric: dict[str, str]
    value: tuple[float, str]


class _Data(BaseModel):
    resultType: str  # noqa: N815 (of the API)
    result: list[_Series]


class _Body(BaseModel):
    status: str
    data: _Data | None = None
    error: str = ""
    warnings: list[str] = []


class Prometheus:
    """One server. An async context manager; safe for many tasks of one event loop."""

    def __init__(
        self,
        url: str,
        *,
        bearer_token_file: str = "",
        ca_file: str = "",
        timeout: float = 3.0,
    ) -> None:
        """`timeout` is in seconds, of a whole query. Raises InvalidInput for a bad `ca_file`."""
        self.url = url.rstrip("/")
        self._token_file = bearer_token_file
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            timeout=timeout,
            # Inside the cluster: the proxies of the environment are for the way out.
            trust_env=False,
            verify=_trust(ca_file),
            limits=httpx.Limits(max_connections=8, keepalive_expiry=60.0),
        )

    @classmethod
    def configured(cls, config: Configured) -> Self | None:
        """None without an address. Raises InvalidInput."""
        if not config.url:
            return None
        return cls(
            config.url,
            bearer_token_file=config.bearer_token_file,
            ca_file=config.ca_file,
            timeout=config.timeout_seconds,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def query(self, expression: str) -> Answer:
        """A vector, now by the server's clock. Raises PrometheusUnavailable."""
        form = {"query": expression, "timeout": f"{self._timeout:g}s"}
        try:
            response = await self._client.post(
                f"{self.url}/api/v1/query", data=form, headers=self._headers()
            )
        except httpx.TimeoutException:
            raise PrometheusUnavailable(
                f"{self.url} does not answer within {self._timeout:g} s", reason="PrometheusTimeout"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise PrometheusUnavailable(f"{self.url} cannot be reached: {why}") from None
        return self._read(response)

    def _headers(self) -> dict[str, str]:
        if not self._token_file:
            return {}
        try:  # each time: a projected token is renewed in its file
            token = Path(self._token_file).read_text().strip()
        except OSError as error:
            raise PrometheusUnavailable(
                f"the bearer token cannot be read: {error.strerror}: {self._token_file}",
                reason="PrometheusRefused",
            ) from None
        return {"Authorization": f"Bearer {token}"}

    def _read(self, response: httpx.Response) -> Answer:
        try:
            body = _Body.model_validate_json(response.content)
        except ValidationError:
            raise self._not_an_answer(response) from None
        if body.status != "success" or body.data is None:
            raise PrometheusUnavailable(
                f"{self.url} refuses a query: {body.error or response.status_code}",
                reason="QueryFailed",
            )
        if body.data.resultType != "vector":
            raise PrometheusUnavailable(
                f"{self.url} answers a vector query with a {body.data.resultType}",
                reason="PrometheusNonsense",
            )
        samples = (Sample(each.metric, _number(each.value[1])) for each in body.data.result)
        return Answer(tuple(samples), tuple(body.warnings))

    def _not_an_answer(self, response: httpx.Response) -> PrometheusUnavailable:
        if response.is_error or response.is_redirect:
            return PrometheusUnavailable(
                f"{self.url} answers with HTTP {response.status_code}", reason="PrometheusRefused"
            )
        return PrometheusUnavailable(
            f"{self.url} does not speak Prometheus' HTTP API", reason="PrometheusNonsense"
        )


def _number(text: str) -> float:
    try:
        return float(text)  # NaN, +Inf and -Inf too
    except ValueError:
        return float("nan")


def _trust(ca_file: str) -> Any:
    if not ca_file:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"no certificate of an authority can be read from {ca_file}: {error}",
            field="prometheus.caFile",
        ) from None
