# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What autoscaling reads: the demand for each model, ControlNets and what was shed included."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from dataclasses import replace

import pytest
from fake_nodes import FACTS, STAGES, FakeNode
from gateways import (
    COMPONENTS,
    CONFIG,
    TEXT,
    assert_empty,
    changed,
    events_of,
    gateway_over,
    identities,
    request,
)
from PIL import Image

from kubediffusion.api import load_workflow
from kubediffusion.errors import Overloaded
from kubediffusion.gateway.core import Gateway
from kubediffusion.scheduling.admission import AdmissionLimits
from kubediffusion.tensors import encode_value
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow, resolve

STATES = ("held", "queued", "running")
ROLE = "controlnet.edges"
CONTROLNET = """
  controlNets:
    - {name: edges, source: {uri: "file:///models/edges"}}
"""


def workflow() -> ResolvedWorkflow:
    return resolve(load_workflow(TEXT + CONTROLNET), PipelineIndex(COMPONENTS))


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    return file.getvalue()


def with_control(**more: object):
    return request(**{"control.edges": picture()}, **more)


@pytest.fixture(autouse=True)
def _controlnets(monkeypatch):
    """Fake nodes that know the kind."""
    monkeypatch.setitem(STAGES, "controlnet", ["control"])
    monkeypatch.setitem(FACTS, "controlnet", {})


class Node(FakeNode):
    def describe(self):
        described = super().describe()
        for status in described.models:
            if self.models[status.identity] == "controlnet":
                flag = encode_value(False)
                status.facts["force_zeros_for_pooled_projection"].CopyFrom(flag)
        return described


def node(path, *roles: str, **more) -> Node:
    resolved = workflow()
    kinds = identities(resolved)
    kinds[resolved.models[ROLE].identity] = "controlnet"
    if roles:
        kinds = {
            resolved.models[role].identity: kinds[resolved.models[role].identity] for role in roles
        }
    return Node(path, "a", kinds, **more)


def demand(gateway: Gateway) -> Counter[tuple[str, str]]:
    """(role, state) of every task that is not done."""
    gateway.measures.refresh()
    roles = {ref.identity: role for role, ref in workflow().models.items()}
    found: Counter[tuple[str, str]] = Counter()
    for metric in gateway.measures.registry.collect():
        for sample in metric.samples:
            if sample.name == "kubediffusion_gateway_model_tasks":
                found[roles[sample.labels["model"]], sample.labels["state"]] += int(sample.value)
    return found


def names_of(gateway: Gateway, metric: str) -> set[tuple[str, str]]:
    return {
        (sample.labels["model"], sample.labels["stage"])
        for family in gateway.measures.registry.collect()
        for sample in family.samples
        if sample.name == metric
    }


async def test_every_model_of_a_workflow_has_a_zero_though_it_has_no_node():
    async with gateway_over([], {"sd3": workflow()}) as gateway:
        zeros = {(role, state): 0 for role in workflow().models for state in STATES}
        assert dict(demand(gateway)) == zeros


async def test_what_was_shed_starts_from_zero_too():
    """The rate of a series that begins with its first event misses that event."""
    async with gateway_over([], {"sd3": workflow()}) as gateway:
        gateway.measures.refresh()
        shed = names_of(gateway, "kubediffusion_gateway_shed_task_seconds_total")
        assert shed == names_of(gateway, "kubediffusion_gateway_model_tasks")
        assert workflow().models[ROLE].identity in {model for model, _ in shed}


async def test_a_request_for_models_never_seen_holds_for_its_controlnet_too():
    async with gateway_over([], {"sd3": workflow()}) as gateway:
        events = gateway.generate(with_control())
        assert (await anext(events)).queued.cold
        held = demand(gateway)
        # The VAE has two stages to do: it encodes the control image and decodes the result.
        assert held[ROLE, "held"] == 1
        assert all(held[role, "held"] >= 1 for role in workflow().models)
        await events.aclose()
        assert_empty(gateway)


async def test_a_request_without_a_control_image_holds_for_no_controlnet():
    async with gateway_over([], {"sd3": workflow()}) as gateway:
        events = gateway.generate(request())
        assert (await anext(events)).queued.cold
        assert demand(gateway)[ROLE, "held"] == 0
        await events.aclose()


async def test_a_controlnet_that_went_is_held_for_and_one_that_runs_is_running(tmp_path):
    go = asyncio.Event()
    began = asyncio.Event()

    def pause(node, assign, step):
        if assign.stage == "denoise" and step == 1:
            began.set()
            return go.wait()
        return None

    fake = node(tmp_path, script=pause)
    identity = workflow().models[ROLE].identity
    async with gateway_over([fake], {"sd3": workflow()}) as gateway:
        await changed(gateway, lambda: gateway.list_workflows()[0].ready)
        running = asyncio.create_task(events_of(gateway, with_control()))
        await asyncio.wait_for(began.wait(), 60)
        assert demand(gateway)[ROLE, "running"] == 1
        assert demand(gateway)["transformer", "running"] == 1
        go.set()
        await running
        assert not demand(gateway).total()

        kind = fake.models.pop(identity)
        fake.report()
        await changed(gateway, lambda: bool(gateway.fleet.missing([identity])))
        events = gateway.generate(with_control())
        async for event in events:
            if event.WhichOneof("kind") == "queued" and event.queued.cold:
                break
        assert demand(gateway)[ROLE, "held"] == 1
        fake.models[identity] = kind
        fake.report()
        assert [event async for event in events][-1].WhichOneof("kind") == "finished"
        assert not demand(gateway).total()


async def test_what_is_shed_is_counted_for_every_model_it_would_have_used(tmp_path):
    fake = node(tmp_path)
    config = replace(CONFIG, admission=AdmissionLimits(max_queue=1))
    async with gateway_over([fake], {"sd3": workflow()}, config) as gateway:
        await changed(gateway, lambda: gateway.list_workflows()[0].ready)
        with pytest.raises(Overloaded):
            await events_of(gateway, with_control(n=2))
        seconds = {
            (sample.labels["model"], sample.labels["stage"]): sample.value
            for family in gateway.measures.registry.collect()
            for sample in family.samples
            if sample.name == "kubediffusion_gateway_shed_task_seconds_total"
        }
        models = workflow().models
        wanted = {(models[role].identity, "encode") for role in models if "encoder" in role}
        wanted |= {(models["vae"].identity, stage) for stage in ("encode_image", "decode")}
        wanted |= {(models["transformer"].identity, "denoise"), (models[ROLE].identity, "control")}
        assert {labels for labels, value in seconds.items() if value > 0} == wanted
