# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""API keys: who may ask this gateway, over HTTP and over gRPC."""

from __future__ import annotations

import hashlib
import hmac

from kubediffusion.errors import Unauthenticated


class ApiKeys:
    """The keys that open the gateway; the tenant of a request is its key's fingerprint, so that
    no caller can pass for another."""

    def __init__(self, keys: frozenset[str]) -> None:
        """Without any key, nobody gets in. Raises ValueError for an empty one."""
        if not all(keys):
            raise ValueError("an API key must not be empty")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in sorted(keys)]

    def tenant(self, authorization: str) -> str:
        """Of a request with this header (in gRPC: metadata). Raises Unauthenticated."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # No early way out: the time taken must not tell which key came close.
        known = [hmac.compare_digest(digest, ours) for ours in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise Unauthenticated(
                "incorrect or missing API key; send it as 'Authorization: Bearer KEY'",
                reason="InvalidApiKey",
            )
        return f"key-{digest.hex()[:16]}"
