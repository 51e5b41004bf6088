# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Node processes with models that weigh nothing, and some that misbehave.

`serve_*` are what a node process runs: they are imported by name in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kubediffusion.errors import UnsupportedModel
from kubediffusion.local.plan import Machine, NodePlan, plan_nodes
from kubediffusion.node import NodeConfig
from kubediffusion.workflow import ModelRef

ROLES = ("text_encoder", "transformer", "vae")
MACHINE = Machine(cpus=2, memory=1 << 30)


def model(role: str, uri: str = "file:///models/standin") -> ModelRef:
    return ModelRef(
        role=role,
        identity=f"{role.replace('_', '-')}-0123456789",
        family="standin",
        component=role,
        uri=uri,
        revision="",
        subfolder="",
        variant="",
        dtype="float32",
        class_name="Standin",
    )


def plans(*roles: str, uri: str = "file:///models/standin") -> tuple[NodePlan, ...]:
    """One node for each role."""
    return tuple(
        NodePlan(role.replace("_", "-"), role, (model(role, uri),), threads=1, memory_limit=0)
        for role in roles
    )


def serve_standins(config: NodeConfig) -> None:
    """A real node whose models load at once, unless their source is called "broken"."""
    from kubediffusion.node.library import Library
    from kubediffusion.node.process import run_process

    run_process(config, Library(lambda name: _family(), _open))


def serve_crash(config: NodeConfig) -> None:
    print("the matrix is singular", file=sys.stderr, flush=True)
    os._exit(3)


def serve_crash_once(config: NodeConfig) -> None:
    """Dies the first time; a file beside the announcement tells."""
    assert config.announce_path is not None
    mark = config.announce_path.with_suffix(".mark")
    if not mark.exists():
        mark.touch()
        serve_crash(config)
    serve_standins(config)


class _Source:
    path = Path("/nonexistent")


def _open(
    uri: str,
    revision: str = "",
    subfolder: str = "",
    allow: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> _Source:
    return _Source()


def _family() -> object:
    from kubediffusion.models.base import Family, LoadSpec

    def load(spec: LoadSpec) -> object:
        if "wrong" in spec.component:
            raise UnsupportedModel(
                "these weights are a kettle's; give a diffusion model's", reason="WrongArchitecture"
            )
        return _Standin(spec)

    return Family("standin", (*ROLES, "wrong"), load)  # type: ignore[arg-type]


class _Standin:
    stages = ("encode",)
    facts: Mapping[str, int] = {}
    nbytes = 0

    def __init__(self, spec: object) -> None:
        self.spec = spec

    def run(self, stage: str, inputs: Mapping[str, object], loras: Sequence[object] = ()) -> object:
        return {}

    def unload(self) -> None:
        return


__all__ = ["MACHINE", "model", "plan_nodes", "plans"]
