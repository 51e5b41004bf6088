# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every error that KubeDiffusion raises on purpose.

    KubeDiffusionError
    ├── InvalidInput                the caller's fault: HTTP 400, INVALID_ARGUMENT
    │   ├── InvalidWorkflow         a workflow file or object that cannot be served
    │   └── UnsupportedModel        weights: no safetensors, torn, or of another architecture
    ├── NotFound                    HTTP 404, NOT_FOUND
    ├── Unauthenticated             HTTP 401, UNAUTHENTICATED
    ├── Conflict                    HTTP 409, ALREADY_EXISTS: an idempotency key used twice
    ├── Overloaded                  HTTP 429, RESOURCE_EXHAUSTED, with retry_after seconds
    ├── DeadlineExceeded            HTTP 504, DEADLINE_EXCEEDED
    ├── Cancelled                   HTTP 499, CANCELLED
    ├── Unavailable                 HTTP 503, UNAVAILABLE: no node, a port in use, a full disk
    │   ├── SourceUnavailable       weights that cannot be fetched or kept
    │   ├── HelperLost              another node that computed a part of a lease's steps is gone
    │   └── TensorLost              an intermediate result is gone; its producer runs again
    └── Internal                    HTTP 500, INTERNAL: our bug

A message says what was wrong, where, and what to do. `field` names the input at fault in the
caller's own words, as a path: ``spec.controlNets[0].source.uri`` or ``inputs.width``.
"""

from __future__ import annotations


class KubeDiffusionError(Exception):
    """Base of all. `reason` is a stable CamelCase word for programs; the text is for people."""

    reason = "Error"
    http_status = 500
    grpc_code = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if reason:
            self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidInput(KubeDiffusionError):
    reason = "InvalidInput"
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class InvalidWorkflow(InvalidInput):
    reason = "InvalidWorkflow"


class UnsupportedModel(InvalidInput):
    reason = "UnsupportedModel"


class NotFound(KubeDiffusionError):
    reason = "NotFound"
    http_status = 404
    grpc_code = "NOT_FOUND"


class Unauthenticated(KubeDiffusionError):
    reason = "Unauthenticated"
    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class Conflict(KubeDiffusionError):
    reason = "Conflict"
    http_status = 409
    grpc_code = "ALREADY_EXISTS"


class Overloaded(KubeDiffusionError):
    reason = "Overloaded"
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"

    def __init__(
        self, message: str, *, retry_after: float, field: str = "", reason: str = ""
    ) -> None:
        super().__init__(message, field=field, reason=reason)
        self.retry_after = retry_after


class DeadlineExceeded(KubeDiffusionError):
    reason = "DeadlineExceeded"
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class Cancelled(KubeDiffusionError):
    reason = "Cancelled"
    http_status = 499
    grpc_code = "CANCELLED"


class Unavailable(KubeDiffusionError):
    reason = "Unavailable"
    http_status = 503
    grpc_code = "UNAVAILABLE"


class SourceUnavailable(Unavailable):
    reason = "SourceUnavailable"


class HelperLost(Unavailable):
    reason = "HelperLost"


class TensorLost(Unavailable):
    reason = "TensorLost"

    def __init__(self, message: str, *, tensor_ids: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensor_ids = tensor_ids


class Internal(KubeDiffusionError):
    reason = "Internal"
