# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Flags of the processes that run in pods: each can be set by an environment variable too."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

PREFIX = "KUBEDIFFUSION_"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{letter}i": 2 ** (10 * n) for n, letter in enumerate("KMGT", start=1)}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class Flags:
    """`--node-id` is KUBEDIFFUSION_NODE_ID in the environment; the flag wins over the variable.

    A variable that is empty is as if it were not set, since a pod's template cannot leave one out.
    """

    def __init__(self, prog: str, description: str, more: str, environ: Mapping[str, str]) -> None:
        self._environ = environ
        epilog = "Each flag can be set by an environment variable: --log-level by "
        self._parser = argparse.ArgumentParser(
            prog=prog, description=description, epilog=f"{epilog}{PREFIX}LOG_LEVEL. {more}".strip()
        )

    def add(self, name: str, convert: Callable[[str], object], default: object, text: str) -> None:
        """A default that is a text is converted too."""
        variable = PREFIX + name.upper().replace("-", "_")
        # argparse converts a text, so a bad variable is told like a bad flag.
        value = self._environ.get(variable) or default
        shown = "" if default in (None, "") else f" (default: {default})".replace("%", "%%")
        self._parser.add_argument(
            f"--{name}",
            type=convert,
            default=value,
            metavar=name.rpartition("-")[2].upper(),
            help=text + shown,
        )

    def parse(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """Exits with a message and code 2 where one is wrong."""
        return vars(self._parser.parse_args(arguments))


def size(text: str) -> int:
    """Bytes of a quantity as Kubernetes writes it: 512Mi, 8G, 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i?|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or 512Mi, or 8G")
    return int(float(match[1]) * _UNITS[match[2]])


def boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def log_level(text: str) -> str:
    """A level of `logging`, in any case."""
    if text.upper() not in _LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is no level; write {', '.join(_LEVELS)}")
    return text.upper()


def at_least(least: float, kind: Callable[[str], T]) -> Callable[[str], T]:
    """A number from `least` up; never infinite, and never nan."""

    def convert(text: str) -> T:
        value: Any = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} up")
        return value

    convert.__name__ = getattr(kind, "__name__", "number")
    return convert
