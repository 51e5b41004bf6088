# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One gateway's Work stream: a reader task, and the call itself as the one writer."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from kubediffusion.errors import Internal, InvalidInput, KubeDiffusionError, Unavailable
from kubediffusion.node.outbox import Outbox
from kubediffusion.v1alpha1 import node_pb2

if TYPE_CHECKING:
    from kubediffusion.node.core import Node

EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
PROTOCOL = node_pb2.ProtocolRange(min=1, max=1)
DEFAULT_LEASE_SECONDS = 30
MAX_LEASE_SECONDS = 3600
# Longer names are nonsense, and would be kept in tables.
MAX_NAME = 256

log = logging.getLogger(__name__)


class Session:
    def __init__(self, gateway_id: str, lease_seconds: float) -> None:
        self.gateway_id = gateway_id
        self.lease_seconds = lease_seconds
        self.outbox = Outbox()

    def close(self, error: KubeDiffusionError | None = None) -> None:
        """Ends the stream once what waits is written, with `error` as its status."""
        self.outbox.close(error)


def greet(message: Any) -> tuple[Session, int]:
    """The session that a Hello asks for, and the protocol to speak. Raises."""
    if message is EOF or message.WhichOneof("kind") != "hello":
        raise InvalidInput("the first message of a Work stream must be Hello", field="hello")
    hello = message.hello
    if not 0 < len(hello.gateway_id) <= MAX_NAME:
        raise InvalidInput(
            f"a gateway's id has 1 to {MAX_NAME} characters", field="hello.gateway_id"
        )
    theirs = hello.protocol
    protocol = min(theirs.max, PROTOCOL.max)
    if protocol < max(theirs.min, PROTOCOL.min):
        raise ProtocolMismatch(
            f"this node speaks protocol {PROTOCOL.min} to {PROTOCOL.max} and gateway "
            f"{hello.gateway_id} {theirs.min} to {theirs.max}; upgrade the older of the two",
            field="hello.protocol",
        )
    seconds = min(hello.lease_seconds or DEFAULT_LEASE_SECONDS, MAX_LEASE_SECONDS)
    return Session(hello.gateway_id, seconds), protocol


class ProtocolMismatch(Unavailable):
    reason = "ProtocolMismatch"
    grpc_code = "FAILED_PRECONDITION"


async def serve(node: Node, context: grpc.aio.ServicerContext) -> None:
    """A Work call from its Hello to its end. Raises KubeDiffusionError as the call's status."""
    session, protocol = greet(await context.read())
    node.open(session, protocol)
    reader = asyncio.create_task(_read(node, session, context), name=f"from {session.gateway_id}")
    try:
        while (event := await session.outbox.next()) is not None:
            await context.write(event)
    finally:
        reader.cancel()
        node.close(session)


async def _read(node: Node, session: Session, context: grpc.aio.ServicerContext) -> None:
    """Hands messages to the node until the gateway leaves; `serve` ends through the outbox."""
    try:
        while (message := await context.read()) is not EOF:
            node.receive(session, message)
            if session.outbox.crowded:
                await session.outbox.room()
    except KubeDiffusionError as error:
        session.close(error)
    except (grpc.RpcError, grpc.aio.UsageError):
        session.close()  # the call is over
    except Exception as error:
        # Unread, the stream would look alive for as long as its lease.
        log.exception("reading from gateway %s", session.gateway_id)
        session.close(Internal(f"unexpected {type(error).__name__}; see the node's log"))
    else:
        session.close()
