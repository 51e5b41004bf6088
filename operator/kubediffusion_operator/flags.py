# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of `kubediffusion-operator`: where the configuration is, and what differs from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kubediffusion.errors import NotFound
from kubediffusion_operator.config import OperatorConfig, load_config

DEFAULT_CONFIG = Path("/etc/kubediffusion/operator.yaml")


@dataclass(frozen=True)
class Options:
    """What the process is told beside its configuration."""

    config: OperatorConfig
    kubeconfig: str = ""
    context: str = ""
    # Where health and metrics listen.
    host: str = "0.0.0.0"
    # A JSON file {"health", "metrics", "pid"}, written once both listen.
    announce_path: Path | None = None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Flags win over the file. Exits with a message where a flag is wrong.

    Raises NotFound where there is no file, InvalidInput where it cannot be used.
    """
    flags = vars(_parser().parse_args(arguments))
    config = _read(flags.pop("config"))
    given = ("namespace", "log_level", "log_json", "health_port", "metrics_port")
    changed = {name: flags.pop(name) for name in given}
    changed = {name: value for name, value in changed.items() if value is not None}
    return Options(config.model_copy(update=changed), **flags)


def _read(path: Path) -> OperatorConfig:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"the configuration {path} cannot be read: {error.strerror}; name another by --config",
            field="--config",
        ) from None
    return load_config(text, source=str(path))


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 to 65535")
    return port


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubediffusion-operator",
        description="Turns DiffusionWorkflows into model nodes, and keeps them so.",
        epilog="In a pod the service account is used; elsewhere the kubeconfig, as kubectl does.",
    )
    add = parser.add_argument
    add("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    add("--namespace", metavar="NAME", help="serve this one only; the file's, else all")
    add("--kubeconfig", default="", metavar="FILE", help="instead of KUBECONFIG or a pod's account")
    add("--context", default="", metavar="NAME", help="of the kubeconfig; its current one")
    add("--host", default="0.0.0.0", help="where health and metrics listen (default: %(default)s)")
    add("--health-port", type=_port, metavar="PORT", help="0: a free port; the file's")
    add("--metrics-port", type=_port, metavar="PORT", help="0: a free port; the file's")
    add("--announce-path", type=Path, metavar="FILE", help="write {health, metrics, pid} here")
    add(
        "--log-level",
        type=str.upper,
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        metavar="LEVEL",
        help="DEBUG, INFO, WARNING or ERROR; the file's",
    )
    add(
        "--log-json",
        type=_boolean,
        nargs="?",
        const=True,
        metavar="true|false",
        help="one JSON object a line; the file's",
    )
    return parser
