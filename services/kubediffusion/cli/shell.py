# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Between a command and the shell: consoles, errors in a sentence, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from textwrap import indent
from typing import Any, TextIO, TypeVar

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kubediffusion.errors import KubeDiffusionError, Overloaded

T = TypeVar("T")


def output() -> Console:
    """What the user asked for goes here: standard output."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def notes() -> Console:
    """Progress and errors: standard error."""
    return Console(stderr=True, highlight=False)


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Errors of ours end the command with a readable line and code 1; bugs too, unless `debug`."""
    try:
        yield
    except KubeDiffusionError as error:
        if debug:
            raise
        show_error(error)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        notes().print("stopped", style="dim")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Whoever read our output has seen enough. Nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug or isinstance(error, typer.BadParameter):
            raise
        text = Text.assemble(
            ("error: ", "bold red"),
            f"unexpected {type(error).__name__}: {error}\n",
            ("This is a bug of ours. Run it again with --debug and report what it prints.", "dim"),
        )
        notes().print(text)
        raise typer.Exit(1) from None


@contextmanager
def logging_to(stream: TextIO | None) -> Iterator[None]:
    """Warnings of this process go to `stream`; to nowhere without one, as a display is in use."""
    from kubediffusion.telemetry.logging import configure

    with open(os.devnull, "w") as nowhere:
        configure("WARNING", stream=stream or nowhere)
        try:
            yield
        finally:
            configure("WARNING", stream=sys.stderr)


def show_error(error: KubeDiffusionError) -> None:
    console = notes()
    first, _, rest = error.message.partition("\n")
    line = Text.assemble(("error: ", "bold red"))
    if error.field:
        line.append(f"{error.field}: ", "bold")
    console.print(line.append(first), soft_wrap=not console.is_terminal)
    if rest:
        # Other problems, or the end of a log: as it is. A Padding is as wide as the console, and
        # cuts off what is longer where lines are not to be wrapped.
        if console.is_terminal:
            console.print(Padding(Text(rest), (0, 0, 0, 2)))
        else:
            console.print(Text(indent(rest, "  ")), soft_wrap=True)
    if isinstance(error, Overloaded):
        console.print(f"Try again in {error.retry_after:.0f} s.", style="dim")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run; SIGTERM and a closed terminal end it in order, as Ctrl-C does."""

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            with suppress(NotImplementedError, RuntimeError):
                loop.add_signal_handler(number, task.cancel)
        return await main

    return asyncio.run(guarded())
