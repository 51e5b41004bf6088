# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From a client's request to the tasks of its images, ready for the wire."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kubediffusion import workflow as wf
from kubediffusion.errors import InvalidInput, Unavailable
from kubediffusion.gateway.images import check_upload
from kubediffusion.gateway.nodes import Facts
from kubediffusion.gateway.plan import ImagePlan, PlannedTask
from kubediffusion.gateway.values import client_value
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2
from kubediffusion.workflow.bind import check_value

MAX_TIMEOUT_SECONDS = 24 * 3600.0
MAX_KEY_LENGTH = 255
_PIXEL_STAGES = ("denoise", "decode", "encode_image")


@dataclass(frozen=True, slots=True)
class Order:
    """A client's request with its values out of the wire, checked as far as no facts are needed."""

    request: gateway_pb2.GenerateRequest
    workflow: wf.ResolvedWorkflow
    inputs: Mapping[str, wf.Value]
    loras: Mapping[str, float]
    # Where the inputs name none: the same again for the same key.
    seed: int
    images: int

    def bind(self, facts: Mapping[str, Facts]) -> wf.Bound:
        return wf.bind(self.workflow, self.inputs, self.loras, facts, self.seed)

    def budget(self, facts: Mapping[str, Facts]) -> float | None:
        """The mean keep ratio that it runs at; None for all tokens. Raises InvalidInput."""
        asked = self.request.budget if self.request.HasField("budget") else None
        return wf.choose_budget(self.workflow, asked, facts.get("transformer", {}))

    def check(self, facts: Mapping[str, Facts]) -> None:
        """What can be said before all models were seen. Raises InvalidInput."""
        self.budget(facts)
        try:
            self.bind(facts)
        except Unavailable:  # a default waits for its model
            for name, value in self.inputs.items():
                check_value(self.workflow.inputs[name], value)


def read_order(
    request: gateway_pb2.GenerateRequest, workflow: wf.ResolvedWorkflow, max_images: int
) -> Order:
    """Raises InvalidInput naming the field at fault."""
    _check_scalars(request, max_images)
    inputs: dict[str, wf.Value] = {}
    for name, sent in request.inputs.items():
        field = f"inputs.{name}"
        value = client_value(sent, field)
        if isinstance(value, list) or not isinstance(value, str | int | float | bytes):
            raise InvalidInput("a list cannot be an input; send one value", field=field)
        inputs[name] = value
    key = request.idempotency_key
    seed = wf.seed_from_key(f"{request.tenant}\0{key}") if key else secrets.randbelow(2**32)
    return Order(request, workflow, inputs, dict(request.loras), seed, request.n or 1)


def _check_scalars(request: gateway_pb2.GenerateRequest, max_images: int) -> None:
    if request.n > max_images:
        raise InvalidInput(f"{request.n} images at once; at most {max_images} are made", field="n")
    if request.HasField("deadline_ms") and request.deadline_ms <= 0:
        raise InvalidInput("a deadline lies ahead: send milliseconds above 0", field="deadline_ms")
    if len(request.idempotency_key) > MAX_KEY_LENGTH:
        raise InvalidInput(
            f"a key has at most {MAX_KEY_LENGTH} characters", field="idempotency_key"
        )
    if not math.isfinite(request.weight) or request.weight < 0:
        raise InvalidInput("a weight is a finite number from 0 up", field="weight")


def uploads(order: Order) -> list[tuple[str, bytes]]:
    return [
        (f"inputs.{name}", value)
        for name, value in order.inputs.items()
        if isinstance(value, bytes)
        and name in order.workflow.inputs
        and order.workflow.inputs[name].type is wf.InputType.IMAGE
    ]


def check_uploads(images: Sequence[tuple[str, bytes]]) -> None:
    """Decodes every one: call it from a worker thread."""
    for field, data in images:
        check_upload(data, field)


def roles_needed(order: Order) -> list[str]:
    """The roles whose models this request may use; a ControlNet only where it is asked for."""
    return [
        role
        for role in order.workflow.models
        if not role.startswith("controlnet.")
        or f"control.{role.removeprefix('controlnet.')}" in order.inputs
    ]


def models_needed(order: Order) -> frozenset[str]:
    """The identities of their models."""
    return frozenset(order.workflow.models[role].identity for role in roles_needed(order))


def plan_images(
    order: Order, bound: wf.Bound, facts: Mapping[str, Facts], request_id: str
) -> list[ImagePlan]:
    """Seeds s, s+1, ...; each image is a request of its own to the nodes."""
    plans: list[ImagePlan] = []
    common = _common(order)
    budget = order.budget(facts)
    if budget is not None:
        common.budget = budget
    pixels = _pixels(bound.values)
    share = wf.work_share(budget, facts.get("transformer", {}))
    cache = order.workflow.step_cache if common.HasField("step_cache") else None
    output = order.workflow.graph.output
    result = (output.task, output.port)
    for index in range(order.images):
        image = bound.image(index)
        image_id = request_id if order.images == 1 else f"{request_id}-{index}"
        tasks = [
            _planned(task, common, image_id, pixels, share * wf.computed_share(cache, task.steps))
            for task in wf.expand(order.workflow, image, facts)
        ]
        plans.append(ImagePlan(image_id, index, image.seed, tasks, result))
    return plans


def _common(order: Order) -> node_pb2.Assign:
    """What all tasks of a request have in common."""
    request, workflow = order.request, order.workflow
    numerics = request.numerics
    if numerics == node_pb2.NUMERICS_UNSPECIFIED:
        numerics = (
            node_pb2.NUMERICS_FAST if workflow.numerics == "fast" else node_pb2.NUMERICS_EXACT
        )
    compiled = [role for role, ref in workflow.models.items() if "compile" in ref.options]
    if compiled and numerics == node_pb2.NUMERICS_EXACT:
        raise InvalidInput(
            f"{compiled[0]} of workflow {workflow.name} is compiled, and rounds otherwise than "
            "diffusers; send numerics fast",
            field="numerics",
        )
    # Asked to be exact, a request of a workflow with a step cache computes every step.
    cache = workflow.step_cache if numerics == node_pb2.NUMERICS_FAST else None
    return node_pb2.Assign(
        step_cache=node_pb2.StepCache(**asdict(cache)) if cache else None,
        workflow=workflow.name,
        tenant=request.tenant,
        weight=request.weight or 1.0,
        priority=request.priority,
        numerics=numerics,
        traceparent=request.traceparent,
    )


def _planned(
    task: wf.Task, common: node_pb2.Assign, request_id: str, pixels: float, share: float
) -> PlannedTask:
    """`share` of a dense denoiser's work is done."""
    template = node_pb2.Assign()
    template.CopyFrom(common)
    template.key.request_id = request_id
    template.key.task = task.name
    template.model = task.model
    template.stage = task.stage
    template.outputs.extend(task.outputs)
    ports: dict[str, tuple[str, str]] = {}
    inputs: dict[str, str] = {}
    for port, source in task.inputs.items():
        if isinstance(source, wf.PortRef):
            ports[port] = (source.task, source.port)
        else:
            template.inputs[port].CopyFrom(encode_value(source.value))
            if source.input:
                inputs[port] = source.input
    for lora in task.loras:
        template.loras.add(
            name=lora.name,
            uri=lora.uri,
            revision=lora.revision,
            scale=lora.scale,
            subfolder=lora.subfolder,
            weight_name=lora.weight_name,
        )
    units = pixels if task.stage in _PIXEL_STAGES else 1.0
    return PlannedTask(
        name=task.name,
        model=task.model,
        stage=task.stage,
        template=template,
        ports=ports,
        # Each budget, and each cache, is an amount of its own, whose time is measured apart.
        units=units * (task.steps * share if task.steps else 1),
        steps=task.steps,
        helpers=task.controlnets,
        inputs=inputs,
    )


def _pixels(values: Mapping[str, wf.Value]) -> float:
    """Work grows with the picture; a graph without a size has one unit of it."""
    width, height = values.get("width"), values.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return float(width * height)
    return 1.0
