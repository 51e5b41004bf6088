# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion history` and `rollback`: a workflow's revisions in a cluster."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kubediffusion.cli.shell import notes, output, reporting, run_async

if TYPE_CHECKING:
    from rich.table import Table

    from kubediffusion.cluster.api import Api
    from kubediffusion.cluster.revisions import Kept

T = TypeVar("T")

_CLUSTER = "Cluster"
Name = Annotated[str, typer.Argument(help="A DiffusionWorkflow.", show_default=False)]
Namespace = Annotated[
    str,
    typer.Option("--namespace", "-n", help="The context's by default.", rich_help_panel=_CLUSTER),
]
Context = Annotated[
    str, typer.Option(help="Of the kubeconfig; its current one.", rich_help_panel=_CLUSTER)
]
Kubeconfig = Annotated[
    str,
    typer.Option(
        envvar="KUBECONFIG", help="As kubectl finds it by default.", rich_help_panel=_CLUSTER
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For a program to read.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def register(app: typer.Typer) -> None:
    app.command()(history)
    app.command()(rollback)


def history(
    name: Name,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the revisions of a workflow in a cluster."""
    with reporting(debug):
        from kubediffusion.cli.screens import indented

        async def ask(api: Api, where: str) -> list[Kept]:
            from kubediffusion.cluster.revisions import history

            return await history(api, where, name)

        kept = _in_cluster(ask, namespace, context, kubeconfig)
        if as_json:
            output().print(json.dumps(list(map(_plain, kept)), indent=2), markup=False)
        elif kept:
            output().print(indented(_table(kept)))
        else:
            notes().print(f"{name} has no revision yet", style="dim")


def rollback(
    name: Name,
    to: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="A revision of `history`; the one before this one by default."
        ),
    ] = None,
    namespace: Namespace = "",
    context: Context = "",
    kubeconfig: Kubeconfig = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring a workflow in a cluster back to an older revision.

    Its weights too: the revision's commits are written into the workflow.
    """
    with reporting(debug):
        from dataclasses import asdict

        from kubediffusion.cluster.revisions import RolledBack

        async def do(api: Api, where: str) -> RolledBack:
            from kubediffusion.cluster.revisions import roll_back

            return await roll_back(api, where, name, to)

        done = _in_cluster(do, namespace, context, kubeconfig)
        if as_json:
            output().print(json.dumps(asdict(done)), markup=False)
            return
        word = "rolled back to" if done.changed else "is as it was at"
        output().print(f"{name} {word} revision {done.number} ({done.name})", markup=False)


def _in_cluster(
    act: Callable[[Api, str], Awaitable[T]], namespace: str, context: str, kubeconfig: str
) -> T:
    """`act` with an API and a namespace."""
    try:
        from kubediffusion.cluster.api import Api
    except ModuleNotFoundError as error:
        from kubediffusion.errors import Unavailable

        raise Unavailable(
            f"this needs {error.name}; install it with `pip install 'kubediffusion[cluster]'`",
            reason="NotInstalled",
        ) from None

    async def run() -> T:
        async with await Api.connect(kubeconfig=kubeconfig, context=context) as api:
            return await act(api, namespace or api.namespace)

    return run_async(run())


def _plain(kept: Kept) -> dict[str, object]:
    revision = kept.revision
    return {
        "revision": revision.number,
        "name": revision.name,
        "created": kept.created,
        "served": kept.served,
        "commit": _commit(kept),
        "changes": list(kept.changes),
    }


def _commit(kept: Kept) -> str:
    return str((kept.revision.data.get("index") or {}).get("commit") or "")


def _table(kept: list[Kept]) -> Table:
    from rich.text import Text

    from kubediffusion.cli.screens import table

    grid = table("revision", "name", "age", "commit", "changed", numbers=("revision",))
    for each in kept:
        name = Text(each.revision.name)
        if each.served:
            name.append(" served", style="green")
        row = (_age(each.created), _commit(each)[:12], ", ".join(each.changes))
        grid.add_row(str(each.revision.number), name, *row)
    return grid


def _age(created: str) -> str:
    """In the words of kubectl: 5s, 7m, 3h, 12d."""
    try:
        since = datetime.now(UTC) - datetime.fromisoformat(created)
    except ValueError:
        return ""
    seconds = max(0, int(since.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
