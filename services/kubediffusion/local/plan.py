# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which model nodes one machine runs, and which models each hosts. Pure.

A pipeline becomes three nodes, by what works at the same time: `text` (all text encoders),
`denoiser` (the transformer and its ControlNets, whose residuals are too large to travel each step)
and `image` (the VAE). Workflows that share a model share its node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kubediffusion.errors import InvalidInput
from kubediffusion.workflow.colocation import is_helper

if TYPE_CHECKING:
    from kubediffusion.workflow import ModelRef, ResolvedWorkflow

MAX_REPLICAS = 64
DENOISER = "denoiser"
_GROUPS = {
    "text_encoder": "text",
    "image_encoder": "text",
    "transformer": DENOISER,
    "unet": DENOISER,
    "vae": "image",
}


@dataclass(frozen=True)
class Machine:
    """What the plan depends on. `memory` is in bytes; `threads` is the user's OMP_NUM_THREADS."""

    cpus: int
    memory: int
    threads: int | None = None


@dataclass(frozen=True)
class NodePlan:
    """One node process. Nodes of one group host the same models."""

    name: str
    group: str
    models: tuple[ModelRef, ...]
    threads: int
    memory_limit: int

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(model.role for model in self.models))


def plan_nodes(
    workflows: Sequence[ResolvedWorkflow], replicas: Mapping[str, int], machine: Machine
) -> tuple[NodePlan, ...]:
    """The nodes for all `workflows`. `replicas` maps a role to how many nodes host its group.

    Raises InvalidInput, field ``replicas.<role>``.
    """
    groups: dict[str, list[ModelRef]] = {}
    for model in _shared(ref for workflow in workflows for ref in workflow.models.values()):
        groups.setdefault(group_of(model.role), []).append(model)
    counts = _counts(groups, workflows, replicas)
    threads = machine.threads or default_threads(machine.cpus, counts.get(DENOISER, 1))
    plans: list[NodePlan] = []
    for group, models in groups.items():
        for number in range(1, counts[group] + 1):
            name = group if counts[group] == 1 else f"{group}-{number}"
            plans.append(NodePlan(name, group, tuple(models), threads, machine.memory))
    return tuple(plans)


def group_of(role: str) -> str:
    """``text_encoder_2`` belongs where its kind does, a ControlNet where the denoisers are."""
    if is_helper(role):
        return DENOISER
    for kind, group in _GROUPS.items():
        if role == kind or role.startswith((f"{kind}_", f"{kind}.")):
            return group
    return role.replace(".", "-")


def default_threads(cpus: int, denoisers: int) -> int:
    """Threads of each node where the user says nothing. All nodes get the same, for exactness.

    The denoisers are busy all the time, the encoders and the VAE briefly between: a share for each
    denoiser and one for all the rest. One thread too many is far worse than one too few: OpenMP
    threads that wait for one another spin, and two of them on a shared two-core machine were
    measured 6 to 15 times slower than one.
    """
    return max(1, cpus // (denoisers + 1))


def parse_threads(text: str | None) -> int | None:
    """OMP_NUM_THREADS, of which the first level counts: ``4`` or ``4,2``. Raises InvalidInput."""
    if not text or not text.strip():
        return None
    first = text.split(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        raise InvalidInput(
            f"{text!r} is no thread count; set a whole number from 1 up, or unset it",
            field="OMP_NUM_THREADS",
        )
    return int(first)


def _shared(models: Iterable[ModelRef]) -> list[ModelRef]:
    """One of each identity, with the LoRAs that any workflow declares for it."""
    known: dict[str, ModelRef] = {}
    for model in models:
        first = known.setdefault(model.identity, model)
        more = tuple(lora for lora in model.loras if lora not in first.loras)
        if more:
            known[model.identity] = replace(first, loras=(*first.loras, *more))
    return list(known.values())


def _counts(
    groups: Iterable[str], workflows: Sequence[ResolvedWorkflow], replicas: Mapping[str, int]
) -> dict[str, int]:
    roles = sorted({role for workflow in workflows for role in workflow.models})
    counts = dict.fromkeys(groups, 1)
    asked: dict[str, str] = {}
    for role, count in replicas.items():
        field = f"replicas.{role}"
        if role not in roles:
            known = ", ".join(roles)
            raise InvalidInput(f"no such role; the roles here are {known}", field=field)
        if not 1 <= count <= MAX_REPLICAS:
            raise InvalidInput(f"must be from 1 to {MAX_REPLICAS}, not {count}", field=field)
        group = group_of(role)
        other = asked.setdefault(group, role)
        if other != role and counts[group] != count:
            raise InvalidInput(
                f"{role} and {other} live on the same nodes, so their numbers must be equal: "
                f"give {other} alone",
                field=field,
            )
        counts[group] = count
    return counts
