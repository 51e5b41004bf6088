# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of `kubediffusion-gateway`; each has an environment variable of its name."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubediffusion.errors import InvalidInput
from kubediffusion.flags import Flags, at_least, boolean, log_level
from kubediffusion.gateway.server import Doors
from kubediffusion.scheduling.policies.live import NAMES, QUEUE, known_policy


@dataclass(frozen=True, slots=True)
class Options:
    """What the process was told. Times are seconds, addresses "host:port" or None for no door."""

    gateway_id: str
    namespace: str = ""
    kubeconfig: str = ""
    context: str = ""
    http: str | None = "0.0.0.0:8080"
    grpc: str | None = "0.0.0.0:50051"
    metrics: str | None = "0.0.0.0:9090"
    api_keys_file: Path | None = None
    public_url: str = ""
    image_urls: bool = True
    grpc_age: float = 120.0
    job_database: str = "sqlite://"
    job_results: str = ""
    hooks: tuple[str, ...] = ()
    max_queue: int = 1024
    policy: str = QUEUE
    profiles: Path | None = None
    shutdown_delay: float = 5.0
    drain_seconds: float = 120.0
    announce_path: Path | None = None
    log_level: str = "INFO"
    log_json: bool = False

    @property
    def doors(self) -> Doors:
        return Doors(self.grpc, self.http, self.metrics, self.grpc_age, self.image_urls)

    def api_keys(self) -> frozenset[str] | None:
        """One a line; None where no key is asked for. Raises InvalidInput."""
        if self.api_keys_file is None:
            return None
        try:
            lines = self.api_keys_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot be read: {error}", field="api-keys-file") from None
        keys = frozenset(line.strip() for line in lines if line.strip())
        if not keys:
            raise InvalidInput(
                f"{self.api_keys_file} holds no key; write one a line, or leave the flag out",
                field="api-keys-file",
            )
        return keys


def parse(
    arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> Options:
    """Flags win over the environment. Exits with a message where one is wrong."""
    return Options(**_flags(os.environ if environ is None else environ).parse(arguments))


def _flags(environ: Mapping[str, str]) -> Flags:
    flags = Flags(
        "kubediffusion-gateway",
        "A gateway for the DiffusionWorkflows of one Kubernetes namespace.",
        "In a pod it needs a service account that may list and watch diffusionworkflows, "
        "controllerrevisions and endpointslices there.",
        environ,
    )
    add, plain = flags.add, Options(gateway_id="")
    add("gateway-id", str, socket.gethostname(), "a name for people, such as the pod's")
    add("namespace", str, "", "whose workflows to serve; the pod's own, or the kubeconfig's")
    add("kubeconfig", str, "", "how to reach the cluster; as kubectl finds it, or the pod's own")
    add("context", str, "", "a context of the kubeconfig; its current one")
    add("http", _door, plain.http, 'the OpenAI images API, or "off"')
    add("grpc", _door, plain.grpc, 'the gRPC API, or "off"')
    add("metrics", _door, plain.metrics, 'Prometheus metrics, or "off"')
    add("api-keys-file", Path, None, "ask clients of both APIs for one of these keys, one a line")
    add("public-url", str, "", "where clients reach the HTTP API, for answers by URL")
    add(
        "image-urls",
        boolean,
        True,
        "false: refuse answers by URL, as where clients reach several gateways by turns",
    )
    add(
        "grpc-age",
        at_least(0, float),
        plain.grpc_age,
        "seconds until a gRPC client is to connect anew, perhaps to another gateway; 0: never",
    )
    add("job-database", str, plain.job_database, "an SQLAlchemy URL; in memory without one")
    add("job-results", str, "", "file:// or s3:// for images of jobs; in the database without one")
    add("hooks", _words, "", "module:object of each hook, with commas between")
    add("max-queue", at_least(1, int), plain.max_queue, "images that may be under way at once")
    add("profiles", Path, None, "a folder of `kubediffusion profile`: run times to begin with")
    add("policy", _policy, plain.policy, f"who says what runs where: {', '.join(NAMES)}")
    add(
        "shutdown-delay",
        at_least(0, float),
        plain.shutdown_delay,
        "serve so long after SIGTERM, not ready any more, until nobody sends requests here",
    )
    add(
        "drain-seconds",
        at_least(0, float),
        plain.drain_seconds,
        "what is under way then has so long to end",
    )
    add("announce-path", Path, None, "write the addresses here as JSON once listening")
    add("log-level", log_level, plain.log_level, "DEBUG, INFO, WARNING or ERROR")
    add("log-json", boolean, False, "true: one JSON object a line")
    return flags


def _door(text: str) -> str | None:
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    if not host or not (port.isdigit() or host == "unix"):
        raise argparse.ArgumentTypeError(f'{text!r} is no address; write "0.0.0.0:8080", or "off"')
    return text


def _policy(text: str) -> str:
    try:
        return known_policy(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
