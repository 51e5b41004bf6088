# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every error that the library raises on purpose.

    ShivaError (a ValueError)
    ├── Unsupported          a combination that token pruning cannot serve
    └── ArtifactMismatch     an artifact that is torn, or made for another backbone

A message says what was wrong, where, and what to do instead.
"""

from __future__ import annotations


class ShivaError(ValueError):
    """Base of all."""


class Unsupported(ShivaError):
    """A combination that cannot be pruned, or not in this way."""


class ArtifactMismatch(ShivaError):
    """The artifact does not belong to this transformer, or is not whole."""
