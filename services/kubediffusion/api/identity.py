# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The identity of a model: a hash of what changes its arithmetic.

Two workflows whose models have one identity share the model. A LoRA is not in it (requests apply
their own), nor is a pruning budget (a table of the artifact, chosen per request).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

IDENTITY_VERSION = 1


@dataclass(frozen=True)
class Arithmetic:
    """All that decides which numbers a model computes. Revisions are resolved ones: commits."""

    family: str
    component: str
    uri: str
    revision: str = ""
    subfolder: str = ""
    variant: str = ""
    class_name: str = ""
    dtype: str = "float32"
    quantization: str = ""
    attention_backend: str = ""
    compile: str = "none"
    tiling: bool = False
    pruning_uri: str = ""
    pruning_revision: str = ""
    pruning_subfolder: str = ""


def identity(arithmetic: Arithmetic) -> str:
    """A DNS label (RFC 1035, at most 40 characters), equal exactly for equal arithmetic.

    The component leads for people's sake: ``text-encoder-2-5f0c8a6b21d94e77``. The hash is the
    first 80 bits of a SHA-256 over canonical JSON.
    """
    content = asdict(arithmetic) | {
        "uri": canonical_uri(arithmetic.uri),
        "pruning_uri": canonical_uri(arithmetic.pruning_uri),
        "version": IDENTITY_VERSION,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    prefix = re.sub(r"[^a-z0-9]+", "-", arithmetic.component.lower()).strip("-")[:19].strip("-")
    if not prefix[:1].isalpha():
        prefix = "m" + prefix
    return f"{prefix}-{hashlib.sha256(canonical).hexdigest()[:20]}"


def canonical_uri(uri: str) -> str:
    """One spelling of a source: no slash at the end, none doubled in the path."""
    scheme, separator, path = uri.partition("://")
    return scheme + separator + re.sub(r"/{2,}", "/", path).rstrip("/") if separator else uri
