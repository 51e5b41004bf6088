# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What all pods of a fake kubelet run: a node that hosts at once whatever it is told to."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import json_format

from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc
from kubediffusion_operator.planning.names import GRPC_PORT

# A loopback address of this process' own, because the port is the same for all nodes.
ADDRESS = f"127.83.{os.getpid() // 254 % 254 + 1}.{os.getpid() % 254 + 1}"
MEMORY = 8 * 2**30


class FakeNode(node_pb2_grpc.ModelNodeServicer):
    """One server for all pods. A context manager; `requests` are the plans it was sent."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        # What models answer by identity, where it is not READY: (reason, message) of a failure.
        self.failing: dict[str, tuple[str, str]] = {}
        # Tasks on each node, by model; a state by model, where it is another; whether it answers.
        self.tasks: dict[str, int] = {}
        # Gateways that need a model for requests without a task here, by model.
        self.needed: dict[str, int] = {}
        self.states: dict[str, int] = {}
        self.answers = threading.Event()
        self.answers.set()
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(4))
        node_pb2_grpc.add_ModelNodeServicer_to_server(self, self._server)

    def __enter__(self) -> FakeNode:
        assert self._server.add_insecure_port(f"{ADDRESS}:{GRPC_PORT}") == GRPC_PORT
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def SetResidency(self, request: Any, context: Any) -> node_pb2.SetResidencyResponse:
        with self._changed:
            self.requests.append(json_format.MessageToDict(request))
            self._changed.notify_all()
        if not self.answers.is_set():
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return node_pb2.SetResidencyResponse(
            generation=request.generation, models=[self._status(m) for m in request.models]
        )

    def Describe(self, request: Any, context: Any) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(memory_limit=MEMORY)

    def wait_for(self, identity: str, fits: Any = bool, timeout: float = 60.0) -> dict[str, Any]:
        """The newest plan for the model, once `fits` of it is true."""

        def newest() -> dict[str, Any] | None:
            for request in reversed(self.requests):
                for model in request.get("models", ()):
                    if model["identity"] == identity:
                        return model
            return None

        with self._changed:
            found = self._changed.wait_for(lambda: (m := newest()) and fits(m), timeout)
            if not found:
                raise TimeoutError(f"no such plan for {identity}; the last: {newest()}")
            return newest() or {}

    def _status(self, model: Any) -> node_pb2.ModelStatus:
        failure = self.failing.get(model.identity)
        if failure is not None:
            return node_pb2.ModelStatus(
                identity=model.identity,
                state=node_pb2.MODEL_STATE_FAILED,
                reason=failure[0],
                message=failure[1],
            )
        return node_pb2.ModelStatus(
            identity=model.identity,
            state=self.states.get(model.identity, node_pb2.MODEL_STATE_READY),  # pyright: ignore[reportArgumentType]
            tasks=self.tasks.get(model.identity, 0),
            needed_by=self.needed.get(model.identity, 0),
            nbytes=2**30,
            digest=f"sha256:{model.identity}",
        )
