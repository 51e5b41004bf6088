# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The node's gRPC face."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from kubediffusion import rpc, tensors
from kubediffusion.node import session
from kubediffusion.node.core import Node
from kubediffusion.node.residency import Residency
from kubediffusion.telemetry.metrics import NodeMetrics
from kubediffusion.tensors import TensorStore
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc, tensor_pb2

log = logging.getLogger(__name__)


class Service(node_pb2_grpc.ModelNodeServicer):
    def __init__(
        self,
        node: Node,
        residency: Residency,
        store: TensorStore,
        metrics: NodeMetrics,
        describe: Callable[[], node_pb2.DescribeResponse],
    ) -> None:
        self._node = node
        self._residency = residency
        self._store = store
        self._metrics = metrics
        self._describe = describe

    async def Work(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        async with rpc.answering(context):
            await session.serve(self._node, context)

    async def Fetch(
        self, request: tensor_pb2.FetchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tensor_pb2.FetchChunk]:
        async for chunk in tensors.serve_fetch(self._store, request, context):
            self._metrics.fetched_bytes.inc(len(chunk.data))
            yield chunk

    async def SetResidency(
        self, request: node_pb2.SetResidencyRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.SetResidencyResponse:
        """Answers at once: `Describe` tells how far the plan is."""
        async with rpc.answering(context):
            self._residency.plan(request.generation, request.planner, request.models)
        return node_pb2.SetResidencyResponse(
            generation=self._residency.generation, models=self._residency.statuses()
        )

    async def Describe(
        self, request: node_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.DescribeResponse:
        return self._describe()

    async def Assist(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        async with rpc.answering(context):
            await self._node.helpers.serve(context)
