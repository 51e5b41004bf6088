# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a gateway tells about itself: workflows with their inputs, nodes with their models."""

from __future__ import annotations

from collections.abc import Iterable

from kubediffusion import workflow as wf
from kubediffusion.gateway.flights import Flight
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2


def describe_gateway(
    gateway_id: str, fleet: Fleet, flights: Iterable[Flight], uptime_seconds: float
) -> gateway_pb2.GetStatusResponse:
    response = gateway_pb2.GetStatusResponse(gateway_id=gateway_id, uptime_seconds=uptime_seconds)
    for address, connection in fleet.connections.items():
        if connection.state is None or connection.description is None:
            response.unreachable.append(address)
            continue
        node = response.nodes.add()
        node.CopyFrom(connection.description)
        node.load.CopyFrom(connection.load)
    for flight in flights:
        where = flight.whereabouts()
        response.held += where.count("held")
        response.queued += where.count("queued")
        response.running += where.count("running")
    return response


def describe_workflow(workflow: wf.ResolvedWorkflow, fleet: Fleet) -> gateway_pb2.WorkflowInfo:
    identities = {role: ref.identity for role, ref in workflow.models.items()}
    missing = set(fleet.missing(list(identities.values())))
    roles = [role for role, identity in identities.items() if identity in missing]
    why = next((text for m in sorted(missing) if (text := fleet.why_missing(m))), "")
    message = ""
    if roles:
        message = f"no node is ready for {', '.join(roles)}" + (f" ({why})" if why else "")
    facts = fleet.facts.get(identities.get("transformer", ""), {})
    return gateway_pb2.WorkflowInfo(
        name=workflow.name,
        ready=not roles,
        message=message,
        inputs=[_input_info(spec) for spec in workflow.inputs.values()],
        loras=list(workflow.loras),
        models=list(identities.values()),
        budgets=wf.offered_budgets(workflow, facts),
        budget=workflow.pruning.budget if workflow.pruning else None,
    )


def _input_info(spec: wf.InputSpec) -> gateway_pb2.InputInfo:
    info = gateway_pb2.InputInfo(
        name=spec.name,
        type=spec.type.value,
        required=spec.required,
        description=spec.description,
    )
    if spec.default is not None:
        info.default.CopyFrom(encode_value(spec.default))
    if spec.minimum is not None:
        info.minimum = spec.minimum
    if spec.maximum is not None:
        info.maximum = spec.maximum
    if spec.multiple_of is not None:
        info.multiple_of = spec.multiple_of
    return info
