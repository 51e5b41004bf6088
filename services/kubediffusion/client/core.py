# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What both faces of the client share; it sends nothing itself."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast
from uuid import uuid4

import grpc

from kubediffusion import rpc
from kubediffusion.client.events import Event, Finished, Image, Preview, Started, Stepped, event_of
from kubediffusion.errors import Internal, InvalidInput, Unavailable
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, tensor_pb2

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
# The gateway answers a missed deadline itself, and better; this is for one that does not answer.
DEADLINE_GRACE_SECONDS = 5.0
_NUMERICS = {"exact": node_pb2.NUMERICS_EXACT, "fast": node_pb2.NUMERICS_FAST}


@dataclass(frozen=True)
class Options:
    """`attempts` in all where a call finds nobody; `timeout` of a call that is no generation.

    `api_key` is for a gateway that asks for one.
    """

    address: str
    tenant: str = ""
    attempts: int = 5
    timeout: float = 30.0
    api_key: str = ""
    now: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def __repr__(self) -> str:
        return f"Options({self.address!r})"  # the key is nobody's business


class GenerateOptions(TypedDict, total=False):
    """The keywords of `generate`, `images`, `image` and `submit`; all are optional.

    Inputs of the workflow: those that the presets know are here; any other goes into `inputs` (or,
    unseen by a type checker, is a keyword too). An image is PNG or JPEG bytes, a Path or a Pillow
    image. ``control={"edges": image, "edges.scale": 0.7}`` is for a ControlNet named edges.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    image: object
    strength: float
    control: Mapping[str, object]
    inputs: Mapping[str, object]

    n: int  # images, with seeds s, s+1, ...
    loras: Mapping[str, float]  # scales of declared LoRAs; those not named keep the workflow's
    previews: int  # at most so many, spread over the steps
    deadline: float  # seconds
    idempotency_key: str  # the same key gets the same images; a random one otherwise
    numerics: Literal["exact", "fast"]
    budget: float | None  # mean keep ratio of a pruned model, 1 for all tokens; None: workflow's
    priority: int
    weight: float
    traceparent: str


def build_request(
    workflow: str,
    tenant: str,
    *,
    inputs: Mapping[str, object] | None = None,
    n: int = 1,
    loras: Mapping[str, float] | None = None,
    previews: int = 0,
    deadline: float | None = None,
    idempotency_key: str = "",
    numerics: str = "",
    budget: float | None = None,
    priority: int = 0,
    weight: float = 1.0,
    traceparent: str = "",
    **more_inputs: object,
) -> gateway_pb2.GenerateRequest:
    """`GenerateOptions` as a message. Raises InvalidInput naming the one at fault."""
    request = gateway_pb2.GenerateRequest(
        workflow=workflow,
        # A key of our own makes a retry safe where the caller has none.
        idempotency_key=idempotency_key or uuid4().hex,
        tenant=tenant,
        traceparent=traceparent,
        protocol=node_pb2.ProtocolRange(min=1, max=1),
    )
    for name, value in _flattened({**more_inputs, **(inputs or {})}):
        request.inputs[name].CopyFrom(_input(name, value))
    for name, scale in (loras or {}).items():
        with _at_fault(f"loras.{name}", scale):
            request.loras[name] = scale
    numbers = {"n": n, "previews": previews, "priority": priority, "weight": weight}
    for name, value in {**numbers, "budget": budget}.items():
        if value is not None:
            with _at_fault(name, value):
                setattr(request, name, value)
    if deadline is not None:
        with _at_fault("deadline", deadline):
            request.deadline_ms = round(deadline * 1000)
    if numerics:
        try:
            request.numerics = _NUMERICS[numerics]
        except KeyError:
            raise InvalidInput('must be "exact" or "fast"', field="numerics") from None
    return request


@contextmanager
def _at_fault(field: str, value: object) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OverflowError):
        raise InvalidInput(f"{value!r} is no number that fits here", field=field) from None


def _flattened(inputs: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """``control={"edges": png, "edges.scale": 0.7}`` is the same as the dotted names."""
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _input(name: str, value: object) -> tensor_pb2.Value:
    if isinstance(value, Path):
        value = value.read_bytes()
    elif hasattr(value, "save") and hasattr(value, "mode"):  # a Pillow image
        buffer = io.BytesIO()
        cast(Any, value).save(buffer, "PNG")
        value = buffer.getvalue()
    try:
        return encode_value(value)
    except InvalidInput as error:
        raise InvalidInput(error.message, field=f"inputs.{name}") from None


class Retry:
    """Says how long to wait before the next attempt, or that there is none.

    Only UNAVAILABLE is tried again: everything that this client sends is idempotent, and any other
    answer would be the same the next time.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._failures = 0

    def succeeded(self) -> None:
        """Something new came: the count starts again."""
        self._failures = 0

    def pause_after(self, error: grpc.RpcError) -> float:
        """Seconds. Raises the error as one of ours where it is final."""
        ours = rpc.from_rpc_error(error, self._options.address)
        self._failures += 1
        if not isinstance(ours, Unavailable) or self._failures >= self._options.attempts:
            raise ours from None
        longest = min(FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1), LONGEST_PAUSE_SECONDS)
        return longest * (0.5 + 0.5 * self._options.jitter())


class Generation:
    """One generation over all its attempts: each event comes out once."""

    def __init__(self, request: gateway_pb2.GenerateRequest, options: Options) -> None:
        self._request = request
        self._now = options.now
        self._ends: float | None = None
        if request.HasField("deadline_ms"):
            self._ends = options.now() + request.deadline_ms / 1000
        self._retry = Retry(options)
        self._seen: set[tuple[object, ...]] = set()
        self._steps: dict[int, int] = {}
        self.finished = False

    def attempt(self) -> tuple[gateway_pb2.GenerateRequest, float | None]:
        """What to send now, with the time that is left, and the call's timeout in seconds."""
        if self._ends is None:
            return self._request, None
        left = max(self._ends - self._now(), 0.001)
        self._request.deadline_ms = max(1, round(left * 1000))
        return self._request, left + DEADLINE_GRACE_SECONDS

    def accept(self, message: gateway_pb2.GenerateEvent) -> Event | None:
        """The event, unless an earlier attempt brought it or this version does not know it."""
        event = event_of(message)
        if event is None or self._is_old(event):
            return None
        self._retry.succeeded()
        self.finished = isinstance(event, Finished)
        return event

    def _is_old(self, event: Event) -> bool:
        if isinstance(event, Stepped):
            old = event.step <= self._steps.get(event.index, 0)
            self._steps[event.index] = max(event.step, self._steps.get(event.index, 0))
            return old
        match event:
            case Image():
                key = ("image", event.index)
            case Preview():
                key = ("preview", event.index, event.step)
            case Started():
                key = ("started", event.index, event.stage, event.node)
            case _:
                return False
        old = key in self._seen
        self._seen.add(key)
        return old

    def pause_after(self, error: grpc.RpcError) -> float:
        return self._retry.pause_after(error)

    def ended(self) -> None:
        """The stream is at its end. Raises Internal where the last event is missing."""
        if not self.finished:
            raise Internal("the gateway ended the stream before the request was finished")


def only_image(images: tuple[Image, ...]) -> Image:
    if len(images) != 1:
        raise InvalidInput(f"{len(images)} images came; use images() for more than one", field="n")
    return images[0]
