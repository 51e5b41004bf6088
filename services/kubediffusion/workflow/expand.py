# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One image of a request as tasks. On the gateway's hot path."""

from __future__ import annotations

from collections.abc import Mapping

from kubediffusion.workflow.bind import missing_fact
from kubediffusion.workflow.expression import MissingFactError
from kubediffusion.workflow.families import FAMILIES, steps_to_run
from kubediffusion.workflow.graph import Node
from kubediffusion.workflow.values import (
    Bound,
    Constant,
    Facts,
    PortRef,
    ResolvedWorkflow,
    Task,
)


def expand(
    resolved: ResolvedWorkflow, bound: Bound, facts: Facts | None = None
) -> tuple[Task, ...]:
    """The tasks of one image, producers first. Nodes whose condition is false are left out, and
    so are nodes and outputs that nobody reads. Raises Unavailable where a fact is missing."""
    try:
        return _expand(resolved, bound, facts or {})
    except MissingFactError as missing:
        raise missing_fact(missing, "") from None


def _expand(resolved: ResolvedWorkflow, bound: Bound, facts: Facts) -> tuple[Task, ...]:
    graph, values = resolved.graph, bound.values
    live = {
        node.name for node in graph.nodes if node.when is None or node.when.evaluate(values, facts)
    }
    read: dict[str, set[str]] = {graph.output.task: {graph.output.port}}
    tasks: list[Task] = []
    for node in reversed(graph.nodes):
        outputs = read.get(node.name)
        if outputs is None or node.name not in live:
            continue
        inputs: dict[str, Constant | PortRef] = {}
        for port, feed in node.inputs:
            taken = feed.take(values, facts, live)
            if taken is not None:
                inputs[port] = taken
                if isinstance(taken, PortRef):
                    read.setdefault(taken.task, set()).add(taken.port)
        tasks.append(_task(resolved, node, bound, inputs, outputs))
    tasks.reverse()
    return tuple(tasks)


def _task(
    resolved: ResolvedWorkflow,
    node: Node,
    bound: Bound,
    inputs: Mapping[str, Constant | PortRef],
    outputs: set[str],
) -> Task:
    model = resolved.models[node.role]
    denoise = node.stage == "denoise"
    return Task(
        name=node.name,
        role=node.role,
        model=model.identity,
        stage=node.stage,
        inputs=inputs,
        outputs=tuple(port for port in node.outputs if port in outputs),
        loras=bound.loras if FAMILIES[resolved.family].roles[node.role].loras else (),
        steps=_steps(inputs) if denoise else 0,
        controlnets=_controlnets(resolved, inputs) if denoise else (),
    )


def _steps(inputs: Mapping[str, Constant | PortRef]) -> int:
    steps, strength = inputs["steps"], inputs.get("strength")
    assert isinstance(steps, Constant), "the signature of denoise asks for a value"
    if "init.latents" not in inputs or not isinstance(strength, Constant):
        return int(steps.value)
    return steps_to_run(int(steps.value), float(strength.value))


def _controlnets(
    resolved: ResolvedWorkflow, inputs: Mapping[str, Constant | PortRef]
) -> tuple[tuple[str, str], ...]:
    return tuple(
        (role.removeprefix("controlnet."), model.identity)
        for role, model in resolved.models.items()
        if model.component == "controlnet"
        and f"control.{role.removeprefix('controlnet.')}.latents" in inputs
    )
