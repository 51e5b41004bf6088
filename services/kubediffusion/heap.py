# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The garbage collector of a process that serves: it stops the loop and the device as it works."""

from __future__ import annotations

import gc

# Every message is dozens of short-lived objects that reference counts free. At Python's 700 the
# collector, which finds next to nothing among them, takes a twentieth of a service's time; so many
# are a few MB at most before cycles among them are found.
_YOUNG = 20_000


def settle() -> None:
    """All that is there now stays: a full collection need not walk the half a million objects of
    torch, diffusers and a model again."""
    gc.collect()
    gc.freeze()
    _, old, oldest = gc.get_threshold()
    gc.set_threshold(_YOUNG, old, oldest)


def resettle() -> None:
    """After something large was given up: it is looked for among what had settled, too."""
    gc.unfreeze()
    settle()


def unsettle() -> None:
    """Before the process, or what served in it, ends: what stays frozen counts as leaked."""
    gc.unfreeze()
    _, old, oldest = gc.get_threshold()
    gc.set_threshold(700, old, oldest)
