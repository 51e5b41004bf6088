# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How a plan is carried out, with the writes and what they come to in the test's hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kubediffusion.cluster.api import ApiError, ApiUnreachable
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.holding import REST_FIRST
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.types import (
    API_VERSION,
    EventRecord,
    Object,
    Observed,
    Plan,
    PlanningError,
    Ref,
    ResidencyWrite,
    ScaleWrite,
)
from kubediffusion_operator.reconciling import Reconciler

WORKFLOW = {
    "apiVersion": API_VERSION,
    "kind": "DiffusionWorkflow",
    "metadata": {"name": "sd3", "namespace": "ns", "uid": "w", "resourceVersion": "1"},
}
EVENT = EventRecord(Ref(API_VERSION, "DiffusionWorkflow", "sd3", "w"), "Normal", "Ready", "m")
RESIDENCY = ResidencyWrite("pod", "u", 0, "127.0.0.1:1", {})


def wanted(kind: str, name: str = "m", content: int = 1) -> Object:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "content": content}


def refusal(status: int) -> ApiError:
    return ApiError("these words", status=status)


class Hands:
    """Writer, recorder, resolver and residency in one: notes what is asked of them, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[tuple[str, str]] = []
        # What a write comes to, by what it is: an error, or the version after it.
        self.come_to: dict[tuple[str, str], Exception | str] = {}
        self.plans: Callable[[Observed], Plan] = lambda observed: Plan()
        self.observed: list[Observed] = []
        self._version = 100
        self.cluster = Cluster(lambda namespace: None, now=lambda: self.now)
        self.cluster.wrote({**WORKFLOW, "metadata": dict(WORKFLOW["metadata"])})
        config = OperatorConfig(image="x")
        me: Any = self
        metrics = OperatorMetrics(CollectorRegistry())
        self.reconciler = Reconciler(
            *(config, self.cluster, me, me, me, me, me, metrics),
            now=lambda: self.now,
            plan=self._plan,
        )

    async def reconcile(self) -> float | None:
        return await self.reconciler.reconcile("ns")

    def _plan(self, observed: Observed, cache: PlanCache) -> Plan:
        self.observed.append(observed)
        return self.plans(observed)

    def _do(self, what: str, name: str) -> str:
        self.done.append((what, name))
        result = self.come_to.get((what, name))
        if isinstance(result, Exception):
            raise result
        self._version += 1
        return result or str(self._version)

    # The writer's

    async def apply(self, body: Object, *, status: bool = False) -> Object:
        what = f"{body['kind']}/status" if status else body["kind"]
        meta = dict(body["metadata"])
        version = self._do(what, meta["name"])
        return {**body, "metadata": {**meta, "resourceVersion": version}}

    async def delete(self, namespace: str, ref: Ref) -> bool:
        self._do(f"delete {ref.kind}", ref.name)
        return True

    async def scale(self, namespace: str, name: str, replicas: int) -> None:
        self._do("scale", name)

    # The recorder's

    def record(self, namespace: str, event: EventRecord) -> bool:
        self._do(f"event {event.reason}", event.about.name)
        return True

    # The resolver's and the residency's

    def results(self, namespace: str) -> dict[Any, Any]:
        return {}

    reports = results

    def keep_only(self, namespace: str, kept: Any) -> None:
        pass

    def want(self, namespace: str, workflow: Object) -> None:
        self._do("resolve", workflow["metadata"]["name"])

    def send(self, namespace: str, writes: list[ResidencyWrite]) -> None:
        for each in writes:
            self._do("residency", each.pod)


@pytest.fixture
def hands() -> Hands:
    return Hands()


async def test_a_plan_is_carried_out_in_its_order_and_made_again(hands: Hands) -> None:
    hands.plans = lambda observed: Plan(
        apply=[wanted("ConfigMap"), wanted("Service"), wanted("Deployment")],
        delete=[Ref("v1", "Service", "old", "u")],
        scale=[ScaleWrite("m", "u", 1)],
        status={("DiffusionWorkflow", "sd3"): {"ready": "1/1"}},
        events=[EVENT],
        residency=[RESIDENCY],
        resolve=[WORKFLOW],
        requeue_after=60.0,
    )
    assert await hands.reconcile() == 0.0
    assert hands.done == [
        ("ConfigMap", "m"),
        ("Service", "m"),
        ("Deployment", "m"),
        ("delete Service", "old"),
        ("scale", "m"),
        ("DiffusionWorkflow/status", "sd3"),
        ("event Ready", "sd3"),
        ("residency", "pod"),
        ("resolve", "sd3"),
    ]


async def test_an_empty_plan_ends_the_rounds_until_its_time_comes(hands: Hands) -> None:
    assert await hands.reconcile() is None
    hands.plans = lambda observed: Plan(requeue_after=2.0)
    assert await hands.reconcile() == 2.0
    assert hands.done == []


async def test_trouble_is_raised_after_everything_else_was_tried(hands: Hands) -> None:
    hands.plans = lambda observed: Plan(
        apply=[wanted("ConfigMap"), wanted("Service")], residency=[RESIDENCY]
    )
    hands.come_to["ConfigMap", "m"] = ApiUnreachable("away")
    with pytest.raises(ApiUnreachable):
        await hands.reconcile()
    assert ("Service", "m") in hands.done
    assert ("residency", "pod") in hands.done


async def test_a_lost_login_is_trouble_and_no_objects_fault(hands: Hands) -> None:
    hands.plans = lambda observed: Plan(apply=[wanted("ConfigMap")])
    hands.come_to["ConfigMap", "m"] = refusal(401)
    with pytest.raises(ApiError):
        await hands.reconcile()


async def test_what_is_refused_rests_and_the_plan_hears_of_it(hands: Hands) -> None:
    content = 1
    hands.plans = lambda observed: Plan(apply=[wanted("Deployment", content=content)])
    hands.come_to["Deployment", "m"] = refusal(422)
    assert await hands.reconcile() == 0.0  # so that the plan may tell
    for _ in range(3):
        assert await hands.reconcile() == REST_FIRST
    assert hands.done == [("Deployment", "m")]
    assert [dict(each.refused) for each in hands.observed] == [
        {},
        *[{("Deployment", "m"): "these words"}] * 3,
    ]
    # Other content is another matter, and what is taken is no longer refused.
    content = 2
    del hands.come_to["Deployment", "m"]
    assert await hands.reconcile() == 0.0
    hands.plans = lambda observed: Plan()
    await hands.reconcile()
    assert hands.observed[-1].refused == {}


async def test_a_refused_status_is_told_by_an_event(hands: Hands) -> None:
    hands.plans = lambda observed: Plan(status={("DiffusionWorkflow", "sd3"): {"ready": "1/1"}})
    hands.come_to["DiffusionWorkflow/status", "sd3"] = refusal(403)
    assert await hands.reconcile() == REST_FIRST
    assert hands.done[-1] == ("event WriteRefused", "sd3")


async def test_a_write_that_the_server_does_not_keep_is_not_repeated(hands: Hands) -> None:
    service = wanted("Service")
    meta = {**service["metadata"], "namespace": "ns", "uid": "s", "resourceVersion": "7"}
    hands.cluster.wrote({**service, "metadata": meta})
    hands.plans = lambda observed: Plan(apply=[wanted("Service")])
    hands.come_to["Service", "m"] = "7"
    assert await hands.reconcile() == REST_FIRST
    assert await hands.reconcile() == REST_FIRST
    assert hands.done == [("Service", "m")]
    hands.now += REST_FIRST
    await hands.reconcile()
    assert hands.done == [("Service", "m")] * 2


async def test_what_went_meanwhile_needs_no_status_and_no_end(hands: Hands) -> None:
    hands.plans = lambda observed: Plan(
        status={("DiffusionWorkflow", "sd3"): {}, ("DiffusionWorkflow", "gone"): {}},
        scale=[ScaleWrite("gone", "u", 1)],
    )
    hands.come_to["DiffusionWorkflow/status", "sd3"] = refusal(404)
    hands.come_to["scale", "gone"] = refusal(404)
    assert await hands.reconcile() is None
    assert ("DiffusionWorkflow/status", "gone") not in hands.done


async def test_a_namespace_without_anything_of_ours_is_not_planned(hands: Hands) -> None:
    hands.cluster.deleted("DiffusionWorkflow", "ns", "sd3", "w")
    assert await hands.reconcile() is None
    assert hands.observed == []


async def test_what_planning_does_not_understand_is_logged_once_for_each_change(
    hands: Hands, caplog: pytest.LogCaptureFixture
) -> None:
    about = Ref(API_VERSION, "DiffusionWorkflow", "sd3", "w")
    first = PlanningError(about, "KeyError: 'x'", "Traceback: line 1")
    errors = [first]
    hands.plans = lambda observed: Plan(errors=errors)
    for _ in range(3):
        await hands.reconcile()
    assert caplog.text.count("Traceback: line 1") == 1
    errors = [PlanningError(about, "KeyError: 'y'", "Traceback: line 2")]
    await hands.reconcile()
    errors = []
    await hands.reconcile()
    errors = [first]
    await hands.reconcile()
    assert caplog.text.count("Traceback: line 2") == 1
    assert caplog.text.count("Traceback: line 1") == 2
