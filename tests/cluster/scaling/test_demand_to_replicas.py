# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From a gateway's numbers, through a real Prometheus, to spec.replicas in a real API server."""

from __future__ import annotations

from tests.cluster.kube import ControlPlane, Kube
from tests.cluster.scaling.conftest import Models, NewPrometheus, ScaleBy, Scaled
from tests.cluster.scaling.measured import Exporter, Late, RealPrometheus, who_scaled

TASKS = "kubediffusion_gateway_model_tasks"
WINDOW = 301


async def test_up_with_the_demand_and_down_when_it_is_over(
    scaled: Scaled,
    models: Models,
    exporter: Exporter,
    prometheus: RealPrometheus,
    control_plane: ControlPlane,
    space: str,
) -> None:
    await models.make()
    await scaled.caught_up()
    mark = control_plane.now()
    exporter.set(queued=4, running=2)
    prometheus.wait_for(TASKS, 6)
    await scaled.rounds()
    assert await models.replicas() == 3
    assert await models.history() == [(1, 3, "DemandRose")]
    assert len(who_scaled(control_plane, mark, space)) == 1
    exporter.set()
    prometheus.wait_for(TASKS, 0)
    await scaled.rounds(3)
    assert await models.replicas() == 3, "not before the window is over"
    scaled.pass_time(WINDOW)
    await scaled.rounds()
    assert await models.replicas() == 1
    assert await models.history() == [(3, 1, "DemandFell"), (1, 3, "DemandRose")]
    entry = (await models.get())["status"]["scalingHistory"][1]
    assert entry["message"].startswith("demand 6 (held 0, queued 4, running 2, shed 0)")
    assert await models.condition("MetricsAvailable") == ("True", "MetricsFound")
    assert await models.condition("ScalingActive") == ("True", "ScalingByDemand")


async def test_a_held_request_brings_its_workflow_up_from_zero(
    scaled: Scaled, models: Models, exporter: Exporter, prometheus: RealPrometheus
) -> None:
    for name in ("dit", "vae", "clip"):
        await models.make(name, replicas=0, minReplicas=0)
    await scaled.caught_up()
    await scaled.rounds()
    assert [await models.replicas(name) for name in ("dit", "vae", "clip")] == [0, 0, 0]
    with exporter.at_once():
        exporter.hold(1)
        for name in ("dit", "vae"):  # it needs these two
            exporter.set(name, held=1)
    prometheus.wait_for(TASKS, 2)
    await scaled.rounds()
    assert [await models.replicas(name) for name in ("dit", "vae", "clip")] == [1, 1, 0]
    assert await models.history() == [(0, 1, "Activated")]


async def test_what_was_shed_is_demand(
    scaled: Scaled, models: Models, exporter: Exporter, prometheus: RealPrometheus
) -> None:
    """Of a model of its own: the rate of it lasts a minute."""
    await models.make("shed")
    await scaled.caught_up()
    rate = 'kubediffusion_gateway_shed_task_seconds_total{model="shed"}'
    prometheus.wait_for(f"count_over_time({rate}[1m]) > bool 2", 1)
    exporter.shed(600, "shed")
    prometheus.wait_for(rate, 600)
    await scaled.rounds()
    assert await models.replicas("shed") > 1


async def test_prometheus_stopped_and_back(
    scale_by: ScaleBy, models: Models, exporter: Exporter, new_prometheus: NewPrometheus
) -> None:
    prometheus = new_prometheus([exporter.port])
    scaled = await scale_by(prometheus)
    await models.make(replicas=3)
    await scaled.caught_up()
    exporter.set(running=6)
    prometheus.wait_for(TASKS, 6)
    await scaled.rounds()
    prometheus.kill()
    await scaled.rounds(2)
    for _ in range(10):
        scaled.pass_time(WINDOW)
        await scaled.rounds()
    assert await models.replicas() == 3
    assert await models.condition("MetricsAvailable") == ("False", "PrometheusUnreachable")
    assert await models.condition("ScalingActive") == ("False", "MetricsUnknown")
    assert "replicas stay as they are" in await models.message("MetricsAvailable")
    # Nobody does anything but start it again.
    exporter.set()
    prometheus.start()
    prometheus.wait_for(TASKS, 0)
    await scaled.rounds()
    assert await models.condition("MetricsAvailable") == ("True", "MetricsFound")
    assert await models.replicas() == 3, "an outage is no quiet time"
    scaled.pass_time(WINDOW)
    await scaled.rounds()
    assert await models.replicas() == 1


async def test_with_a_gateway_down_replicas_rise_and_do_not_fall(
    scale_by: ScaleBy, models: Models, exporter: Exporter, new_prometheus: NewPrometheus
) -> None:
    other = Exporter(("dit",))
    prometheus = new_prometheus([exporter.port, other.port])
    prometheus.wait_for("up", 2)
    scaled = await scale_by(prometheus)
    await models.make(replicas=2)
    await models.make("vae")
    await scaled.caught_up()
    await scaled.rounds(2)
    assert await models.condition("MetricsAvailable") == ("True", "MetricsFound")
    # The other one does not know this model: perhaps not yet.
    assert await models.condition("MetricsAvailable", "vae") == ("False", "GatewaySilent")
    other.close()
    prometheus.wait_for("up", 1)
    await scaled.rounds(2)
    scaled.pass_time(WINDOW)
    await scaled.rounds()
    assert await models.replicas() == 2
    assert await models.condition("MetricsAvailable") == ("False", "GatewayDown")
    assert "1 of 2 gateways" in await models.message("MetricsAvailable")
    exporter.set(running=6)
    prometheus.wait_for(TASKS, 6)
    await scaled.rounds()
    assert await models.replicas() == 3
    # It is not to be scraped any more: then the rest is all there is.
    exporter.set()
    prometheus.scrape([exporter.port])
    prometheus.wait_for("count(up)", 1)
    prometheus.wait_for(TASKS, 0)
    await scaled.rounds()
    scaled.pass_time(WINDOW)
    await scaled.rounds()
    assert await models.replicas() == 1


async def test_a_scrape_configuration_that_is_wrong_is_said(
    scale_by: ScaleBy, models: Models, exporter: Exporter, new_prometheus: NewPrometheus
) -> None:
    exporter.set(queued=100)
    wrong = [
        {"namespace": "elsewhere"},
        {"namespace": ""},
        {"component": "model-node"},
        {"component": ""},
    ]
    prometheus = new_prometheus([exporter.port], *wrong)
    prometheus.wait_for("up", len(wrong))
    scaled = await scale_by(prometheus)
    await models.make(replicas=2)
    await scaled.caught_up()
    await scaled.rounds(2)
    assert await models.replicas() == 2
    assert await models.condition("MetricsAvailable") == ("False", "NoGateway")
    assert "labels namespace and component" in await models.message("MetricsAvailable")


async def test_series_that_are_missing_old_or_no_counts(
    scale_by: ScaleBy, models: Models, new_prometheus: NewPrometheus
) -> None:
    odd = Exporter(("dit", "vae"))
    odd.set("vae", running=float("nan"))
    odd.registry.register(Late(90.0))  # type: ignore[arg-type]
    prometheus = new_prometheus([odd.port])
    prometheus.wait_for('kubediffusion_gateway_model_tasks{model="late"}', 24)
    scaled = await scale_by(prometheus)
    for name in ("dit", "vae", "nobody", "late"):
        await models.make(name, replicas=2)
    await scaled.caught_up()
    await scaled.rounds(2)
    said = {
        name: (await models.condition("MetricsAvailable", name))[1]
        for name in ("dit", "vae", "nobody", "late")
    }
    assert said == {
        "dit": "MetricsFound",
        "vae": "MetricsInvalid",
        "nobody": "SeriesMissing",
        "late": "MetricsStale",
    }
    scaled.pass_time(WINDOW)
    await scaled.rounds()
    assert [await models.replicas(name) for name in said] == [1, 2, 2, 2]
    odd.close()


async def test_an_external_model_is_never_touched(
    scaled: Scaled,
    models: Models,
    exporter: Exporter,
    prometheus: RealPrometheus,
    control_plane: ControlPlane,
    space: str,
) -> None:
    await models.make(mode="external")
    await scaled.caught_up()
    mark = control_plane.now()
    exporter.set(queued=100)
    prometheus.wait_for(TASKS, 100)
    await scaled.rounds(3)
    found = await models.get()
    assert found["spec"]["replicas"] == 1
    assert await models.condition("ScalingActive") == ("False", "External")
    assert who_scaled(control_plane, mark, space) == set()


async def test_at_rest_nothing_is_written(
    scaled: Scaled,
    models: Models,
    exporter: Exporter,
    prometheus: RealPrometheus,
    control_plane: ControlPlane,
    space: str,
) -> None:
    for name in ("dit", "vae"):
        await models.make(name)
    await models.make("clip", mode="external")
    await scaled.caught_up()
    await scaled.rounds(2)
    before = control_plane.now()
    for tick in range(10):
        exporter.set(running=tick % 2)
        prometheus.wait_for(TASKS, tick % 2)
        await scaled.rounds()
    written = [w for w in control_plane.writes(before) if w["objectRef"].get("namespace") == space]
    assert written == []


async def test_a_fresh_process_goes_on_from_what_the_cluster_says(
    scaled: Scaled, models: Models, exporter: Exporter, prometheus: RealPrometheus
) -> None:
    await models.make(replicas=3)
    await scaled.caught_up()
    prometheus.wait_for(TASKS, 0)
    await scaled.rounds()
    scaled.pass_time(WINDOW - 10)
    scaled.restart()
    await scaled.rounds()
    scaled.pass_time(20)
    await scaled.rounds()
    assert await models.replicas() == 3, "the window begins anew"
    scaled.pass_time(WINDOW)
    await scaled.rounds()
    assert await models.replicas() == 1


async def test_the_condition_of_others_stay_theirs(
    scaled: Scaled,
    models: Models,
    exporter: Exporter,
    prometheus: RealPrometheus,
    admin: Kube,
    space: str,
) -> None:
    """Two field managers of one list: each applies its own items only, again and again."""
    await models.make()
    await scaled.caught_up()
    time = "2026-01-01T00:00:00Z"
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": time}
    operators = {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionModel",
        "metadata": {"name": "dit"},
        "status": {"referencedBy": [{"name": "sd3", "role": "dit"}], "conditions": [ready]},
    }

    def apply_operators(force: bool) -> None:
        admin.apply(
            operators, space, manager="kubediffusion-operator", force=force, subresource="status"
        )

    apply_operators(force=True)
    await scaled.caught_up()
    exporter.set(queued=4)
    prometheus.wait_for(TASKS, 4)
    await scaled.rounds(2)
    apply_operators(force=False)  # a conflict would be an error
    found = await models.get()
    types = sorted(each["type"] for each in found["status"]["conditions"])
    assert types == ["MetricsAvailable", "Ready", "ScalingActive"]
    assert found["status"]["scalingHistory"]
    assert found["status"]["referencedBy"] == [{"name": "sd3", "role": "dit"}]
    owners = {
        entry["manager"]: entry["fieldsV1"]["f:status"]
        for entry in found["metadata"]["managedFields"]
        if entry.get("subresource") == "status"
    }
    ours = owners["kubediffusion-autoscaler"]
    assert set(ours) == {"f:conditions", "f:scalingHistory"}
    assert set(ours["f:conditions"]) == {
        'k:{"type":"MetricsAvailable"}',
        'k:{"type":"ScalingActive"}',
    }
    assert set(owners["kubediffusion-operator"]["f:conditions"]) == {'k:{"type":"Ready"}'}
