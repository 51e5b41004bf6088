# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""gRPC as this project uses it: options, binding, and errors to and from a call's status.

An error crosses the wire as a status code, its message, and trailing metadata:

    kd-error         the class in `errors`, so that it comes out as the class that went in
    kd-reason        the stable CamelCase reason
    kd-field         the input at fault
    kd-retry-after   seconds, of `Overloaded`
    kd-tensor        one for each lost tensor's id, of `TensorLost`

Values are percent-encoded, because metadata is ASCII and a field's name is the caller's own word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, unquote

import grpc
import grpc.aio

from kubediffusion import errors
from kubediffusion.errors import KubeDiffusionError

# The number of an enum's value that only a newer peer knows, as a word.
UNKNOWN_WORD = "UNSPECIFIED"
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
# Headers have a limit of 8 KiB in all; a message longer than this is cut.
MAX_STATUS_CHARS = 2048
MAX_STATUS_TENSORS = 16

Options = tuple[tuple[str, int], ...]

log = logging.getLogger(__name__)

CHANNEL_OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A node that comes back is used within a second.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A peer that vanished without a word (power, network) is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Channels to a restarted process must not inherit the back-off of older ones.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its connections at random; let the second one fail.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Enum(Protocol):
    """An enum of the protos, as protobuf generates it."""

    def keys(self) -> Sequence[str]: ...
    def values(self) -> Sequence[Any]: ...


def word_of(enum: Enum, number: int, prefix: str) -> str:
    """``READY`` of ``MODEL_STATE_READY``; UNSPECIFIED for a value that only a newer peer knows."""
    names = {int(value): key for key, value in zip(enum.keys(), enum.values(), strict=True)}
    return names.get(number, UNKNOWN_WORD).removeprefix(prefix)


def connect(address: str) -> grpc.aio.Channel:
    """A channel to "host:port" or "unix:/path"; it connects on its first use."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def bind(server: grpc.aio.Server, address: str) -> str:
    """Listens on "host:port" (port 0 takes a free one) or "unix:/path"; returns where it does.

    Raises Unavailable, reason PortInUse, where the address cannot be had.
    """
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise _cannot_bind(address) from error
    if port == 0:
        raise _cannot_bind(address)
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _cannot_bind(address: str) -> errors.Unavailable:
    return errors.Unavailable(
        f"cannot listen on {address}: another process holds it, or this machine has no such "
        "address; stop that process or choose another address",
        reason="PortInUse",
    )


# ---------------------------------------------------------------- errors to and from the wire


@dataclass(frozen=True)
class Status:
    """What `ServicerContext.abort` takes."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str], ...]


def to_status(error: KubeDiffusionError) -> Status:
    metadata = [("kd-error", type(error).__name__), ("kd-reason", quote(error.reason))]
    if error.field:
        metadata.append(("kd-field", quote(_shortened(error.field))))
    if isinstance(error, errors.Overloaded):
        metadata.append(("kd-retry-after", f"{error.retry_after:.3f}"))
    if isinstance(error, errors.TensorLost):
        metadata += [("kd-tensor", quote(i)) for i in error.tensor_ids[:MAX_STATUS_TENSORS]]
    code = grpc.StatusCode[error.grpc_code]
    return Status(code, _shortened(error.message), tuple(metadata))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_STATUS_CHARS else text[: MAX_STATUS_CHARS - 1] + "…"


def from_rpc_error(error: grpc.RpcError, peer: str = "") -> KubeDiffusionError:
    """The error that the other side raised, or what a failure of the call itself amounts to."""
    details = error.details() or ""
    known = _from_metadata(details, error.trailing_metadata() or ())
    return known if known is not None else _from_code(error.code(), details, peer)


def _from_metadata(details: str, metadata: Iterable[Any]) -> KubeDiffusionError | None:
    """`metadata` are pairs of a key and a value."""
    pairs = [
        (key, unquote(value))
        for key, value in metadata
        if isinstance(key, str) and isinstance(value, str)
    ]
    values = dict(pairs)
    kind = getattr(errors, values.get("kd-error", ""), None)
    if not (isinstance(kind, type) and issubclass(kind, KubeDiffusionError)):
        return None
    field, reason = values.get("kd-field", ""), values.get("kd-reason", "")
    if issubclass(kind, errors.Overloaded):
        retry_after = float(values.get("kd-retry-after", "1"))
        return kind(details, retry_after=retry_after, field=field, reason=reason)
    if issubclass(kind, errors.TensorLost):
        ids = tuple(value for key, value in pairs if key == "kd-tensor")
        return kind(details, tensor_ids=ids)
    return kind(details, field=field, reason=reason)


def _from_code(code: grpc.StatusCode, details: str, peer: str) -> KubeDiffusionError:
    """For a status that no code of ours made: the transport's, a proxy's, another program's."""
    where = f"{peer}: " if peer else ""
    text = f"{where}{details or code.name}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in details:
            return errors.InvalidInput(
                f"{text}; a message may have {MAX_MESSAGE_BYTES} bytes", reason="MessageTooLarge"
            )
        return errors.Overloaded(text, retry_after=1.0)
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(f"{where or 'the server '}cannot be reached ({details})")
    return _BY_CODE.get(code, errors.Internal)(text)


_BY_CODE: dict[grpc.StatusCode, type[KubeDiffusionError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Unauthenticated,
    grpc.StatusCode.ALREADY_EXISTS: errors.Conflict,
    grpc.StatusCode.ABORTED: errors.Conflict,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Unavailable,
}


@asynccontextmanager
async def answering(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Around the body of a handler: errors of ours become its status, a bug becomes INTERNAL.

    A bug's text stays in the log of this side, since it may name what a client must not see.
    """
    try:
        yield
    except KubeDiffusionError as error:
        status = to_status(error)
    except grpc.aio.AbortError:
        raise
    except grpc.RpcError as error:
        status = to_status(from_rpc_error(error))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Something that the handler waited for was cancelled, not the call. grpc.aio sends no
        # status for this exception: the client would wait for ever.
        status = to_status(errors.Cancelled("the work behind this call was cancelled"))
    except Exception as error:
        log.exception("unexpected error in a gRPC handler")
        status = to_status(errors.Internal(f"unexpected {type(error).__name__}; see the log"))
    else:
        return
    await context.abort(status.code, status.details, status.trailing_metadata)
