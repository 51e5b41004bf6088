# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models run on the nodes of which others: the one rule for a machine and for a cluster.

A ControlNet helps a denoiser at every step. What it hands over is large (Stable Diffusion 3:
6 residuals of 25 MB for each branch of a step) and the denoiser waits for it, so it is hosted by
the denoiser's own nodes, and by those of every other denoiser that it helps. It has no nodes, and
no number of replicas, of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kubediffusion.workflow.values import ResolvedWorkflow

DENOISE = "denoise"
_HELPERS = frozenset({"controlnet"})


def is_helper(component: str) -> bool:
    """Of a component, or of a role: ``controlnet.edges`` is a ``controlnet``."""
    return component.partition(".")[0] in _HELPERS


def hosts_of(workflow: ResolvedWorkflow) -> Mapping[str, tuple[str, ...]]:
    """By the role of each helper, the roles of the denoisers that host it.

    These are the denoisers whose node in the graph reads it. One that no node reads is hosted by
    all denoisers: it is declared, and has to be somewhere.
    """
    helpers = [role for role, model in workflow.models.items() if is_helper(model.component)]
    if not helpers:
        return {}
    denoisers = [node for node in workflow.graph.nodes if node.stage == DENOISE]
    every = tuple(dict.fromkeys(node.role for node in denoisers))
    found: dict[str, tuple[str, ...]] = {}
    for role in helpers:
        port = f"control.{role.partition('.')[2]}.latents"
        reading = [node.role for node in denoisers if any(name == port for name, _ in node.inputs)]
        found[role] = tuple(dict.fromkeys(reading)) or every
    return found


def hosting(workflows: Iterable[ResolvedWorkflow]) -> Mapping[str, frozenset[str]]:
    """By the identity of each helper, the identities of its hosts in all `workflows`."""
    found: dict[str, set[str]] = {}
    for workflow in workflows:
        models = workflow.models
        for helper, hosts in hosts_of(workflow).items():
            identities = {models[role].identity for role in hosts}
            found.setdefault(models[helper].identity, set()).update(identities)
    return {helper: frozenset(hosts) for helper, hosts in found.items()}
