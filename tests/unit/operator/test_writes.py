# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kubediffusion.cluster.api import ApiError, ApiUnreachable
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.planning.types import Ref
from kubediffusion_operator.writing import ATTEMPTS, PAUSE_MOST, Writer
from tests.unit.operator.virtual_time import now, run


def refuse(status: int, retry_after: float = 0.0) -> ApiError:
    return ApiError("no", status=status, retry_after=retry_after)


def service(version: int = 1) -> dict[str, Any]:
    meta = {"name": "m", "namespace": "ns", "uid": "u", "resourceVersion": str(version)}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta}


class Server:
    """Answers each call with the next of `answers`."""

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self._answers = list(answers)
        self.calls: list[tuple[float, str, str, dict[str, Any]]] = []

    async def request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        self.calls.append((now(), method, path, options))
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def writer(server: Server) -> tuple[Writer, Cluster, CollectorRegistry]:
    registry = CollectorRegistry()
    cluster = Cluster(lambda namespace: None, now=lambda: 0.0)
    metrics = OperatorMetrics(registry)
    return (
        Writer(server, cluster, metrics, "boss", jitter=lambda: 1.0),  # pyright: ignore[reportArgumentType]
        cluster,
        registry,
    )


def count(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"kubediffusion_operator_{name}_total", labels) or 0.0


def test_an_apply_is_forced_by_its_manager_and_its_answer_is_known_at_once() -> None:
    async def scenario() -> None:
        server = Server(service(5))
        boss, cluster, registry = writer(server)
        await boss.apply(service())
        ((_, method, path, options),) = server.calls
        assert (method, path) == ("PATCH", "/api/v1/namespaces/ns/services/m")
        assert options["params"] == {"fieldManager": "boss", "force": "true"}
        assert options["content_type"] == "application/apply-patch+yaml"
        assert cluster.get("Service", "ns", "m") == service(5)
        assert count(registry, "writes", kind="Service", verb="apply") == 1

    run(scenario())


def test_a_write_that_changes_nothing_is_not_counted() -> None:
    async def scenario() -> None:
        boss, _, registry = writer(Server(service(5), service(5), service(6)))
        for _ in range(3):
            await boss.apply(service())
        assert count(registry, "writes", kind="Service", verb="apply") == 2

    run(scenario())


@pytest.mark.parametrize("error", [refuse(409), refuse(500), refuse(504), ApiUnreachable("cut")])
def test_what_passes_is_tried_again_with_growing_pauses(error: Exception) -> None:
    async def scenario() -> None:
        server = Server(error, error, service(5))
        boss, _, registry = writer(server)
        await boss.apply(service())
        assert [round(when, 2) for when, *_ in server.calls] == [0.0, 0.2, 0.6]
        code = str(error.status) if isinstance(error, ApiError) else "unreachable"
        assert count(registry, "api_errors", verb="apply", code=code) == 2

    run(scenario())


def test_it_is_given_up_after_so_many_tries() -> None:
    async def scenario() -> None:
        server = Server(*[refuse(503)] * 10)
        boss, _, _ = writer(server)
        with pytest.raises(ApiError):
            await boss.apply(service())
        assert len(server.calls) == ATTEMPTS

    run(scenario())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_for_good_is_not_repeated(status: int) -> None:
    async def scenario() -> None:
        server = Server(refuse(status))
        boss, _, _ = writer(server)
        with pytest.raises(ApiError):
            await boss.apply(service())
        assert len(server.calls) == 1

    run(scenario())


@pytest.mark.parametrize(("asked", "waited"), [(3.0, 3.0), (0.0, 0.2), (3600.0, PAUSE_MOST)])
def test_the_pause_that_the_server_asks_for_is_kept_up_to_a_bound(
    asked: float, waited: float
) -> None:
    async def scenario() -> None:
        server = Server(refuse(429, asked), service(5))
        boss, _, _ = writer(server)
        await boss.apply(service())
        assert round(server.calls[1][0], 2) == waited

    run(scenario())


def test_a_deletion_is_of_that_very_object() -> None:
    async def scenario() -> None:
        server = Server({"kind": "Status", "status": "Success"})
        boss, cluster, registry = writer(server)
        cluster.wrote(service(3))
        assert await boss.delete("ns", Ref("v1", "Service", "m", "u"))
        assert server.calls[0][3]["body"]["preconditions"] == {"uid": "u"}
        assert cluster.get("Service", "ns", "m") is None
        assert count(registry, "writes", kind="Service", verb="delete") == 1

    run(scenario())


def test_an_object_that_somebody_holds_stays_known_until_it_is_gone() -> None:
    async def scenario() -> None:
        held = service(4)
        held["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        boss, cluster, _ = writer(Server(held))
        cluster.wrote(service(3))
        assert await boss.delete("ns", Ref("v1", "Service", "m", "u"))
        assert cluster.get("Service", "ns", "m") is not None

    run(scenario())


@pytest.mark.parametrize(("status", "known"), [(404, False), (409, True)])
def test_what_is_gone_or_another_one_need_not_be_deleted(status: int, known: bool) -> None:
    async def scenario() -> None:
        server = Server(refuse(status))
        boss, cluster, _ = writer(server)
        cluster.wrote(service(3))
        assert not await boss.delete("ns", Ref("v1", "Service", "m", "u"))
        assert (cluster.get("Service", "ns", "m") is not None) == known
        assert len(server.calls) == 1

    run(scenario())


def test_a_scale_is_written_by_its_own_manager_through_the_subresource() -> None:
    async def scenario() -> None:
        server = Server({"kind": "Scale"})
        boss, _, _ = writer(server)
        await boss.as_manager("scaler").scale("ns", "m", 3)
        ((_, method, path, options),) = server.calls
        assert method == "PATCH"
        assert path.endswith("/namespaces/ns/diffusionmodels/m/scale")
        assert options["params"] == {"fieldManager": "scaler"}
        assert options["body"] == {"spec": {"replicas": 3}}

    run(scenario())
