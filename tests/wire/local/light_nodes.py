# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A node's face without torch behind it, for tests that start many processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import grpc.aio

from kubediffusion import rpc
from kubediffusion.node import NodeConfig
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc


class _Node(node_pb2_grpc.ModelNodeServicer):
    """Every model that it is told to host is ready at once."""

    def __init__(self) -> None:
        self.models: list[node_pb2.ModelStatus] = []

    async def SetResidency(
        self, request: node_pb2.SetResidencyRequest, context: Any
    ) -> node_pb2.SetResidencyResponse:
        self.models = [
            node_pb2.ModelStatus(identity=spec.identity, state=node_pb2.MODEL_STATE_READY)
            for spec in request.models
        ]
        return node_pb2.SetResidencyResponse(generation=request.generation)

    async def Describe(
        self, request: node_pb2.DescribeRequest, context: Any
    ) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(models=self.models)


def serve_light(config: NodeConfig) -> None:
    asyncio.run(_serve(config))


async def _serve(config: NodeConfig) -> None:
    assert config.announce_path is not None
    server = grpc.aio.server()
    node_pb2_grpc.add_ModelNodeServicer_to_server(_Node(), server)
    address = rpc.bind(server, config.address)
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    fresh = config.announce_path.with_suffix(".new")
    fresh.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    fresh.replace(config.announce_path)
    await stop.wait()
    await server.stop(0)
