# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A generation as it is seen: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from kubediffusion.client.events import Event, Finished, Queued, Resumed, Started, Stepped
from kubediffusion.local.supervisor import NodePhase, NodeReport
from kubediffusion.v1alpha1 import node_pb2

_STAGES = {"encode_image": "encode image"}


class _Count(ProgressColumn):
    """``14/28``, and nothing where there is nothing to count."""

    def render(self, task: Task) -> Text:
        if not task.fields.get("counted") or task.total is None:
            return Text("")
        return Text(f"{int(task.completed)}/{int(task.total)}", style="bold")


class _Seconds(TimeElapsedColumn):
    """``1.4 s``"""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{seconds:.1f} s" if seconds is not None else "", style="dim")


class GenerationView:
    """Follows nodes while they load, and then a request's events. A context manager."""

    def __init__(self, console: Console, count: int = 1, quiet: bool = False) -> None:
        self._console = console
        self._count = count
        self._live = console.is_terminal and not quiet
        self._quiet = quiet
        self._progress = Progress(
            TextColumn("  {task.description:<13}"),
            BarColumn(bar_width=36, style="grey30", complete_style="cyan", finished_style="green"),
            _Count(),
            _Seconds(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=not self._live,
            transient=False,
        )
        self._bars: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._steps: dict[int, int] = {}
        self._stage = ""
        self._nodes: dict[str, NodeReport] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays: above the bars, or in its turn."""
        if not self._quiet:
            self._progress.console.print(f"  {text}", style="dim", soft_wrap=True)

    # ------------------------------------------------------------ loading

    def starting(self, models: int) -> None:
        self._total["models"] = models
        if self._live:
            self._bar("models", models, note="starting nodes")
        else:
            self.say(f"loading {models} models")

    def node_changed(self, report: NodeReport) -> None:
        before = self._nodes.get(report.name)
        self._nodes[report.name] = report
        if report.phase is NodePhase.RESTARTING and (
            before is None or before.phase is not NodePhase.RESTARTING
        ):
            self.say(f"{report.message}; starting it again")
        ready, loading = _loading(self._nodes.values())
        if self._live and "models" in self._bars:
            self._progress.update(self._bars["models"], completed=ready, note=loading)

    def ready(self) -> None:
        if self._live and "models" in self._bars:
            total = self._total["models"]
            self._progress.update(self._bars["models"], completed=total, note="")
        elif not self._live:
            self.say("ready")

    # ------------------------------------------------------------ a request

    def event(self, event: Event) -> None:
        match event:
            case Queued(cold=True):
                self.say("waiting for a node that can run this")
            case Queued(ahead=ahead) if ahead:
                self.say(f"queued behind {ahead}")
            case Started(stage=stage):
                self._started(stage)
            case Stepped(index=index, step=step, total_steps=total):
                self._stepped(index, step, total)
            case Resumed(stage=stage, from_step=step, reason=reason):
                where = f" from step {step}" if step else ""
                self.say(f"{stage} goes on elsewhere{where}: {reason}")
            case Finished():
                self._finished()
            case _:
                return

    def _started(self, stage: str) -> None:
        first = stage not in self._done
        self._done[stage] = self._done.get(stage, 0) + 1
        if first and not self._live:
            self.say(_STAGES.get(stage, stage))
        if first and self._live:
            self._end_bars_before(stage)
            self._bar(stage, None)
        self._stage = stage

    def _end_bars_before(self, stage: str) -> None:
        """Of one picture, a stage begins when those before it are done; several overlap."""
        if self._count == 1:
            for name in self._bars:
                if name not in ("models", stage):
                    self._end_bar(name)

    def _stepped(self, index: int, step: int, total: int) -> None:
        self._steps[index] = max(step, self._steps.get(index, 0))
        done, all_steps = sum(self._steps.values()), total * self._count
        if self._live and "denoise" in self._bars:
            bar = self._bars["denoise"]
            self._progress.update(bar, completed=done, total=all_steps, counted=True)

    def _finished(self) -> None:
        for name in self._bars:
            self._end_bar(name)
        if not self._live and self._steps:
            self.say(f"denoised {sum(self._steps.values())} steps")

    def _bar(self, name: str, total: int | None, note: str = "") -> None:
        self._bars[name] = self._progress.add_task(
            _STAGES.get(name, name), total=total, note=note, counted=total is not None
        )

    def _end_bar(self, name: str) -> None:
        task = next(t for t in self._progress.tasks if t.id == self._bars[name])
        if not task.finished:
            total = task.total if task.total is not None else 1
            self._progress.update(task.id, total=total, completed=total)


def _loading(reports: Iterable[NodeReport]) -> tuple[int, str]:
    """How many models are ready, and in a few words what is going on with the others."""
    ready, words = 0, ""
    for report in reports:
        for model in report.models:
            if model.state == node_pb2.MODEL_STATE_READY:
                ready += 1
            elif model.state == node_pb2.MODEL_STATE_DOWNLOADING:
                done, total = model.downloaded_bytes, model.total_bytes
                words = (
                    f"downloading {decimal(done)} of {decimal(total)}" if total else "downloading"
                )
            elif model.state == node_pb2.MODEL_STATE_LOADING and not words:
                words = f"loading {model.identity.rpartition('-')[0]}"
    return ready, words
