# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion status` and `models`: what a running gateway says."""

from __future__ import annotations

import json
from dataclasses import asdict

from kubediffusion.cli import shell
from kubediffusion.client import Client, Status, Workflow
from kubediffusion.errors import InvalidInput, Unavailable
from kubediffusion.local.folders import running


def gateway_address(address: str) -> str:
    """The given one, or that of the one `up` that runs here. Raises Unavailable, InvalidInput."""
    if address:
        return address
    found = [state for state in running() if state.grpc]
    if not found:
        raise Unavailable(
            "nothing is up on this machine; start it with `kubediffusion up -f FILE`, or name a "
            "gateway with --address HOST:PORT",
            reason="NotUp",
        )
    if len(found) > 1:
        each = ", ".join(f"{state.grpc} ({', '.join(state.workflows)})" for state in found)
        raise InvalidInput(f"{len(found)} are up: {each}; say which", field="--address")
    return found[0].grpc


def show_status(address: str, as_json: bool, api_key: str = "") -> None:
    from kubediffusion.cli.screens import status_screen

    status, workflows = _ask(address, api_key)
    if as_json:
        content = {
            "address": address,
            **asdict(status),
            "workflows": [asdict(workflow) for workflow in workflows],
        }
        shell.output().print(json.dumps(content, indent=2), markup=False, soft_wrap=True)
        return
    shell.output().print(status_screen(status, workflows))


def show_models(address: str, as_json: bool, api_key: str = "") -> None:
    """The built-in and downloaded ones always; served ones where a gateway is up."""
    from kubediffusion.cli.catalog import builtin_models, downloaded_models
    from kubediffusion.cli.screens import models_screen

    try:
        status, workflows = _ask(gateway_address(address), api_key)
    except Unavailable:
        if address:
            raise
        status, workflows = None, ()
    builtin, downloaded = builtin_models(), downloaded_models()
    if as_json:
        content = {
            "builtin": [asdict(each) for each in builtin],
            "downloaded": [asdict(each) for each in downloaded],
            "workflows": [asdict(workflow) for workflow in workflows],
            "served": [
                {"node": node.id, **asdict(model)}
                for node in (status.nodes if status else ())
                for model in node.models
            ],
        }
        shell.output().print(json.dumps(content, indent=2), markup=False, soft_wrap=True)
        return
    shell.output().print(models_screen(builtin, downloaded, status, workflows))


def _ask(address: str, api_key: str) -> tuple[Status, tuple[Workflow, ...]]:
    with Client(address, attempts=2, timeout=5, api_key=api_key) as client:
        return client.status(), client.workflows()
