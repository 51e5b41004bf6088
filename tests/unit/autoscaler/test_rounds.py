# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Rounds of the autoscaler: what is written, when, and what is said of it."""

from __future__ import annotations

import asyncio

from autoscaler_cases import deployment, model
from autoscaler_setup import Setup

from kubediffusion.cluster.api import ApiError
from kubediffusion_operator.autoscaler import driver
from kubediffusion_operator.autoscaler.prometheus import PrometheusUnavailable
from kubediffusion_operator.config import OperatorConfig, ScalingConfig

DOWN = PrometheusUnavailable("http://p:9090 cannot be reached: refused")


async def test_up_at_once_down_after_the_window_and_said_with_the_numbers():
    here = Setup(model(scaling={"minReplicas": 1, "maxReplicas": 3}))
    here.numbers.say(queued=4, running=2)
    assert await here.rounds() == [("dit", 3)]
    assert here.server.history() == [(1, 3, "DemandRose")]
    (entry,) = here.server.objects["dit"]["status"]["scalingHistory"]
    assert entry["time"] == "2027-01-15T08:00:00Z"
    assert entry["message"].startswith("demand 6 (held 0, queued 4, running 2, shed 0) at 2 a")
    here.numbers.say()
    assert await here.rounds(59) == []
    assert await here.rounds() == [("dit", 1)]
    assert here.server.history() == [(3, 1, "DemandFell"), (1, 3, "DemandRose")]
    assert here.server.condition("MetricsAvailable") == ("True", "MetricsFound")
    assert here.server.condition("ScalingActive") == ("True", "ScalingByDemand")


async def test_at_rest_nothing_is_written_whatever_the_load_does_meanwhile():
    here = Setup(model(replicas=2, scaling={"minReplicas": 2, "maxReplicas": 4}))
    await here.rounds()
    written = len(here.server.writes)
    for tick in range(20):
        here.numbers.say(running=tick % 4, queued=tick % 2, ages={"g1": tick, "g2": 1})
        assert await here.rounds() == []
    assert len(here.server.writes) == written


async def test_a_change_is_written_once_and_its_generation_is_said():
    here = Setup(model())
    await here.rounds()
    here.numbers.say(queued=4)
    before = len(here.server.writes)
    await here.rounds(5)
    kinds = [what for _, what, _ in here.server.writes[before:]]
    # The scaling, what was decided, and that the conditions are of the new generation.
    assert kinds == ["scale", "status", "status"]
    assert here.server.objects["dit"]["status"]["conditions"][0]["observedGeneration"] == 2


async def test_only_the_last_ten_decisions_are_kept():
    scaling = {
        "minReplicas": 0,
        "maxReplicas": 30,
        "behavior": {"scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 1}]}},
    }
    here = Setup(model(scaling=scaling))
    here.numbers.say(queued=100)
    await here.rounds(14)
    assert [to for _, to, _ in here.server.history()] == list(range(15, 5, -1))


# ---------------------------------------------------------------- unknown is not zero


async def test_without_prometheus_replicas_hold_and_come_back_by_themselves():
    here = Setup(model(replicas=3))
    here.numbers.say(running=6)
    await here.rounds()
    here.numbers.says = DOWN
    await here.rounds()
    assert here.server.condition("MetricsAvailable") == ("True", "MetricsFound"), "may be a blip"
    assert await here.rounds(200) == []
    assert here.server.condition("MetricsAvailable") == ("False", "PrometheusUnreachable")
    assert here.server.condition("ScalingActive") == ("False", "MetricsUnknown")
    message = here.server.objects["dit"]["status"]["conditions"][0]["message"]
    assert (
        message == "http://p:9090 cannot be reached: refused; meanwhile replicas stay as they are"
    )
    here.numbers.say()
    assert await here.rounds(59) == [], "an outage is no quiet time"
    assert here.server.condition("MetricsAvailable") == ("True", "MetricsFound")
    assert here.server.condition("ScalingActive") == ("True", "ScalingByDemand")
    assert await here.rounds(2) == [("dit", 0)]


async def test_a_blip_is_not_written_and_does_not_move_anything():
    here = Setup(model(replicas=3))
    here.numbers.say(running=6)
    await here.rounds(2)
    written = len(here.server.writes)
    for _ in range(5):
        here.numbers.says = DOWN
        await here.rounds()
        here.numbers.say(running=6)
        await here.rounds()
    assert len(here.server.writes) == written


async def test_with_a_gateway_down_replicas_rise_and_do_not_fall():
    here = Setup(model(replicas=2))
    part = {"up": {"g1": 1, "g2": 0}, "ages": {"g1": 1}}
    here.numbers.say(**part)
    assert await here.rounds(100) == []
    assert here.server.condition("MetricsAvailable") == ("False", "GatewayDown")
    assert here.server.condition("ScalingActive") == ("True", "ScalingByDemand")
    here.numbers.say(queued=8, **part)
    assert await here.rounds() == [("dit", 4)]


async def test_without_an_address_the_condition_says_what_to_set():
    here = Setup(model())
    here.scaler._prometheus = None
    await here.rounds()
    assert here.server.condition("MetricsAvailable") == ("False", "NoPrometheus")
    assert "prometheus.url" in here.server.objects["dit"]["status"]["conditions"][0]["message"]


# ---------------------------------------------------------------- restarts


async def test_a_fresh_process_takes_nothing_down_before_its_window():
    here = Setup(model(replicas=4))
    await here.rounds(55)
    here.restart()
    assert await here.rounds(60) == []
    assert await here.rounds(2) == [("dit", 0)]


async def test_a_fresh_process_keeps_to_the_rate_of_what_was_done_before():
    policy = {"type": "Pods", "value": 2, "periodSeconds": 60}
    scaling = {"maxReplicas": 20, "behavior": {"scaleUp": {"policies": [policy]}}}
    here = Setup(model(scaling=scaling))
    here.numbers.say(queued=40)
    assert await here.rounds() == [("dit", 3)]
    here.restart()
    assert await here.rounds(11) == []
    assert await here.rounds() == [("dit", 5)]


async def test_an_object_made_again_under_its_name_has_no_past():
    here = Setup(model(replicas=4))
    await here.rounds(59)
    here.server.objects["dit"]["metadata"]["uid"] = "another"
    here.server.watch()
    assert await here.rounds(60) == []


# ---------------------------------------------------------------- not ours


async def test_what_others_scale_is_told_so_and_left_alone():
    here = Setup(model(replicas=7, scaling={"mode": "external", "maxReplicas": 4}))
    here.numbers.say(queued=100)
    assert await here.rounds(3) == []
    assert here.server.condition("ScalingActive") == ("False", "External")
    assert here.server.condition("MetricsAvailable") == ("", "")
    assert len(here.server.writes) == 1


async def test_of_a_model_without_scaling_nothing_is_said():
    here = Setup(model(replicas=7, scaling={}))
    here.numbers.say(queued=100)
    await here.rounds(3)
    assert here.server.writes == []


async def test_what_was_said_goes_with_the_scaling():
    here = Setup(model(scaling={"maxReplicas": 4}))
    here.numbers.say(queued=4)
    await here.rounds(2)
    del here.server.objects["dit"]["spec"]["scaling"]
    here.server.watch()
    await here.rounds(3)
    assert here.server.condition("ScalingActive") == ("", "")
    assert here.server.history() == [(1, 2, "DemandRose")]


async def test_handed_over_it_keeps_its_history_and_taken_back_it_goes_on():
    here = Setup(model(scaling={"maxReplicas": 4}))
    here.numbers.say(queued=4)
    await here.rounds()
    here.server.objects["dit"]["spec"]["scaling"] = {"mode": "external", "maxReplicas": 4}
    here.server.watch()
    await here.rounds(2)
    assert here.server.condition("ScalingActive") == ("False", "External")
    assert here.server.history() == [(1, 2, "DemandRose")]
    here.server.objects["dit"]["spec"]["scaling"] = {"maxReplicas": 4}
    here.server.watch()
    here.numbers.say(queued=8)
    assert await here.rounds() == [("dit", 4)]
    assert here.server.history() == [(2, 4, "DemandRose"), (1, 2, "DemandRose")]


# ---------------------------------------------------------------- budget


async def test_a_workflow_that_does_not_fit_is_told_on_each_of_its_models():
    config = OperatorConfig(image="n", scaling=ScalingConfig(gpuBudget=1))
    asleep = {"replicas": 0, "scaling": {"minReplicas": 0, "maxReplicas": 2}}
    here = Setup(
        model("dit", **asleep),
        model("vae", **asleep),
        deployment("dit", gpus=1),
        deployment("vae", gpus=1),
        config=config,
    )
    here.numbers.say("dit", "vae", held=1, workflow_held=1)
    assert await here.rounds(3) == []
    for name in ("dit", "vae"):
        assert here.server.condition("ScalingActive", name) == ("False", "ActivationBlocked")
        (condition,) = (
            c
            for c in here.server.objects[name]["status"]["conditions"]
            if c["type"] == "ScalingActive"
        )
        assert "sd3 needs 2 GPUs to come up" in condition["message"]


async def test_a_workflow_that_came_up_is_not_called_blocked_any_more():
    config = OperatorConfig(image="n", scaling=ScalingConfig(gpuBudget=0))
    asleep = model(replicas=0, scaling={"minReplicas": 0, "maxReplicas": 2})
    here = Setup(asleep, deployment(gpus=1), config=config)
    here.numbers.say(held=1, workflow_held=1)
    await here.rounds(2)
    assert here.server.condition("ScalingActive") == ("False", "ActivationBlocked")
    here.scaler._config = OperatorConfig(image="n", scaling=ScalingConfig(gpuBudget=1))
    assert await here.rounds() == [("dit", 1)]
    assert here.server.condition("ScalingActive") == ("True", "ScalingByDemand")


async def test_what_holds_a_model_back_is_said_until_it_has_not_for_a_while():
    config = OperatorConfig(image="n", scaling=ScalingConfig(gpuBudget=2))
    here = Setup(model(replicas=2), deployment(gpus=1), config=config)
    here.numbers.say(queued=8)
    await here.rounds(2)
    assert here.server.condition("ScalingActive") == ("True", "GpuBudgetExhausted")
    written = len(here.server.writes)
    for _ in range(5):
        here.numbers.say(running=4)
        await here.rounds()
        here.numbers.say(queued=8)
        await here.rounds()
    assert len(here.server.writes) == written
    here.numbers.say(running=4)
    await here.rounds(13)
    assert here.server.condition("ScalingActive") == ("True", "ScalingByDemand")


# ---------------------------------------------------------------- trouble


async def test_a_write_that_is_refused_is_tried_again_and_not_taken_for_done():
    here = Setup(model())
    here.numbers.say(queued=4)
    here.server.refuse = ApiError("no", status=403, reason="Forbidden")
    assert await here.rounds(2) == []
    assert here.outcome("error") == 2
    here.server.refuse = None
    assert await here.rounds() == [("dit", 2)]
    assert here.server.history() == [(1, 2, "DemandRose")]
    assert here.outcome("ok") == 1


async def test_a_status_that_is_refused_still_tells_of_the_decision_later():
    here = Setup(model())
    here.numbers.say(queued=4)
    request = here.server.request

    async def no_status(method, path, **more):
        if path.endswith("/status"):
            raise ApiError("no", status=403)
        return await request(method, path, **more)

    here.server.request = no_status
    assert await here.rounds() == [("dit", 2)]
    here.server.request = request
    assert await here.rounds(2) == []
    assert here.server.history() == [(1, 2, "DemandRose")]


async def test_a_model_that_went_meanwhile_is_nobodys_trouble(caplog):
    here = Setup(model("dit"), model("vae"))
    here.numbers.say("dit", "vae", queued=4)
    here.server.gone.add("dit")
    assert await here.rounds() == [("vae", 2)]
    assert not caplog.records


async def test_one_namespaces_trouble_is_not_anothers(caplog):
    broken = model("broken")
    broken["metadata"]["namespace"] = "a"
    broken["spec"]["replicas"] = "three"
    here = Setup(model(), broken)
    here.numbers.say(queued=4)
    assert await here.rounds() == [("dit", 2)]
    assert "namespace a cannot be decided" in caplog.text


async def test_a_round_ends_however_long_the_api_server_takes(monkeypatch, caplog):
    here = Setup(model())
    here.numbers.say(queued=4)
    monkeypatch.setattr(driver, "ROUND_SECONDS", 0.05)
    request = here.server.request

    async def hang(method, path, **more):
        await asyncio.Event().wait()

    here.server.request = hang
    await asyncio.wait_for(here.rounds(), 10)
    assert "was cut off" in caplog.text
    assert here.outcome("error") == 1
    here.server.request = request
    assert await here.rounds() == [("dit", 2)]


async def test_models_are_counted_by_what_is_known_of_them():
    here = Setup(model("dit"), model("vae"), model("theirs", scaling={"mode": "external"}))
    here.numbers.say("dit")
    await here.rounds()
    name = "kubediffusion_operator_autoscaled_models"
    counts = {
        state: here.registry.get_sample_value(name, {"state": state})
        for state in ("known", "partial", "unknown")
    }
    assert counts == {"known": 1, "partial": 0, "unknown": 1}


async def test_the_loop_keeps_its_interval_and_survives_a_bad_round(monkeypatch):
    config = OperatorConfig(image="n", scaling=ScalingConfig(intervalSeconds=0.01))
    here = Setup(model(), config=config)
    seen, enough = [], asyncio.Event()

    async def bad_read():
        seen.append(1)
        if len(seen) == 3:
            enough.set()
        raise ZeroDivisionError

    monkeypatch.setattr(here.scaler, "_read", bad_read)
    task = asyncio.create_task(here.scaler.run())
    await asyncio.wait_for(enough.wait(), 30)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
