# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the nodes can run and what they do: the bookkeeping under `kubediffusion`'s decisions."""

from __future__ import annotations

from collections.abc import Sequence

from kubediffusion.scheduling.pipelines import Pipeline
from kubediffusion.scheduling.policies.running import Running
from kubediffusion.scheduling.policies.tickets import LeaseCosts, Shape
from kubediffusion.scheduling.policy import Node, Work


class Board:
    """Sets of models by number (`keys`), which nodes hold each, who is idle, who runs what."""

    def __init__(
        self, nodes: Sequence[Node], pipelines: Sequence[Pipeline], costs: LeaseCosts, batch: int
    ) -> None:
        self.nodes = nodes
        self.families: list[str] = []
        self.learn(pipelines, costs)
        self.hosts = [node.host for node in nodes]
        # By node: the keys that it can run, and how sought after it is.
        self.can: list[frozenset[int]] = [frozenset()] * len(nodes)
        self.sought = [0.0] * len(nodes)
        self.idle: set[int] = set()
        self.running = Running(batch)

    def learn(self, pipelines: Sequence[Pipeline], costs: LeaseCosts) -> None:
        """These pipelines at these costs, in place of those of before; `refresh` comes next.
        Families keep their numbers."""
        self.keys: list[tuple[str, ...]] = []
        self.shapes: dict[str, Shape] = {}
        for pipeline in {each.name: each for each in pipelines}.values():
            self.shapes[pipeline.name] = self._shape(pipeline, costs)
        self.holders: list[set[int]] = [set() for _ in self.keys]
        # By pipeline: whether some nodes can denoise and not encode.
        self.apart = [False] * len(self.shapes)
        # Nodes with encoders that others lack: while they denoise, no request can begin.
        self.scarce: set[int] = set()
        self.demand = [1.0] * len(self.keys)

    def _shape(self, pipeline: Pipeline, costs: LeaseCosts) -> Shape:
        if pipeline.family not in self.families:
            self.families.append(pipeline.family)
        shape = Shape(
            len(self.shapes),
            pipeline,
            self._key(pipeline.encoders),
            self._key((pipeline.denoiser, *pipeline.controls, pipeline.decoder)),
            self.families.index(pipeline.family),
            0.0,
            0.0,
            0.0,
            pipeline.decode_seconds(costs.costs),
        )
        shape.encode = costs.encode(shape)
        shape.step = costs.step([shape])
        shape.split = costs.step([shape], split=True)
        return shape

    def _key(self, models: tuple[str, ...]) -> int:
        if models not in self.keys:
            self.keys.append(models)
        return self.keys.index(models)

    def refresh(self) -> None:
        """After nodes or their models changed."""
        for node in self.nodes[len(self.hosts) :]:
            self.hosts.append(node.host)
            self.can.append(frozenset())
            self.sought.append(0.0)
        for node in self.nodes:
            self.hosts[node.index] = node.host
            can = frozenset(
                key for key, models in enumerate(self.keys) if node.up and node.holds(models)
            )
            self.can[node.index] = can
        self.holders = [
            {node.index for node in self.nodes if key in self.can[node.index]}
            for key in range(len(self.keys))
        ]
        self.apart = [
            not self.holders[shape.denoise_key] <= self.holders[shape.encode_key]
            for shape in self.shapes.values()
        ]
        self.scarce = set[int]().union(
            *(
                self.holders[shape.encode_key]
                for shape in self.shapes.values()
                if self.apart[shape.index]
            )
        )
        for node in self.nodes:
            self.sought[node.index] = sum(
                self.demand[key] / len(self.holders[key]) for key in self.can[node.index]
            )
            if not node.up or node.loading:
                self.idle.discard(node.index)
            elif node.index not in self.running.works and node.foreign_until <= 0.0:
                self.idle.add(node.index)

    def occupy(self, work: Work) -> None:
        self.idle.difference_update((work.node, *work.helpers))
        self.running.add(work)

    def release(self, work: Work) -> None:
        self.running.remove(work)
        for node in (work.node, *work.helpers):
            record = self.nodes[node]
            if record.up and not record.loading and record.foreign_until <= 0.0:
                self.idle.add(node)

    def hear_of_others(self, now: float) -> None:
        """Nodes that other gateways use are not ours to give; those they left are."""
        for node in self.nodes:
            if node.foreign_until > now:
                self.idle.discard(node.index)
                continue
            node.foreign_until = 0.0
            if node.up and not node.loading and node.index not in self.running.works:
                self.idle.add(node.index)
