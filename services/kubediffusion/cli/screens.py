# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Tables: where the time went, nodes, workflows, models. Quiet ones: no frames, few colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kubediffusion.client.events import Finished, StageTime
from kubediffusion.client.records import Node, Status, Workflow
from kubediffusion.local.supervisor import NodePhase, NodeReport
from kubediffusion.v1alpha1 import node_pb2

if TYPE_CHECKING:
    from kubediffusion.cli.catalog import Stored
    from kubediffusion.workflow import ResolvedWorkflow

_ORDER = ("encode", "encode_image", "denoise", "decode")
_PHASE_STYLE = {
    NodePhase.READY: "green",
    NodePhase.RESTARTING: "yellow",
    NodePhase.FAILED: "red",
}
_STATE_STYLE = {"ready": "green", "failed": "red"}


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """Headings dim, numbers to the right, no lines."""
    grid = Table(box=None, header_style="dim", padding=(0, 3, 0, 0), pad_edge=False)
    right = set(numbers)
    for column in columns:
        if column in right:
            grid.add_column(column, justify="right", no_wrap=True)
        else:
            grid.add_column(column, overflow="fold")
    return grid


def indented(content: RenderableType) -> Padding:
    # Not padded to the right: a terminal that echoes ^C there would begin another line.
    return Padding(content, (0, 0, 0, 2), expand=False)


# ---------------------------------------------------------------- where the time went


def time_table(finished: Finished, start_seconds: float | None) -> RenderableType:
    numbers = ("tasks", "queue", "transfer", "run")
    grid = table("stage", "node", *numbers, numbers=numbers)
    stages = sorted(
        {time.stage for time in finished.stages},
        key=lambda stage: _ORDER.index(stage) if stage in _ORDER else len(_ORDER),
    )
    for stage in stages:
        times = [time for time in finished.stages if time.stage == stage]
        grid.add_row(stage.replace("_", " "), _nodes(times), *_sums(times))
    images = len({time.index for time in finished.stages})
    what = "the picture" if images == 1 else f"{images} pictures"
    line = Text.assemble((_seconds(finished.seconds), "bold"), f" for {what}")
    if start_seconds is not None:
        line.append(f", after {_seconds(start_seconds)} to start", style="dim")
    again = sum(max(0, time.attempts - 1) for time in finished.stages)
    if again:
        line.append(f"; {again} tasks ran again", style="yellow")
    return indented(Group(grid, Text(), line))


def _nodes(times: Sequence[StageTime]) -> str:
    names = sorted({time.node for time in times})
    return ", ".join(names) if len(names) < 4 else f"{len(names)} nodes"


def _sums(times: Sequence[StageTime]) -> tuple[str, str, str, str]:
    return (
        str(len(times)),
        # Tasks of a stage wait for one another, so that their sum says nothing.
        _seconds(max(time.queue_seconds for time in times)),
        _seconds(sum(time.fetch_seconds for time in times)),
        _seconds(sum(time.run_seconds for time in times)),
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


# ---------------------------------------------------------------- a supervisor's nodes


def supervised_nodes(reports: Sequence[NodeReport], nodes: Sequence[Node]) -> RenderableType:
    """`reports` are the supervisor's, `nodes` the gateway's view of the same, by name."""
    numbers = ("models", "memory", "queued", "running", "restarts")
    grid = table("node", "state", *numbers, numbers=numbers)
    known = {node.id: node for node in nodes}
    for report in reports:
        node = known.get(report.name)
        ready = sum(1 for model in report.models if model.state == node_pb2.MODEL_STATE_READY)
        grid.add_row(
            report.name,
            Text(report.phase.value, style=_PHASE_STYLE.get(report.phase, "cyan")),
            f"{ready}/{len(report.models)}" if report.models else "",
            decimal(sum(model.nbytes for model in report.models)),
            str(node.queued) if node else "",
            str(node.running) if node else "",
            Text(str(report.restarts), style="yellow" if report.restarts else "dim"),
        )
    troubles = [Text(r.message, style="dim") for r in reports if r.message]
    return indented(Group(grid, *troubles))


# ---------------------------------------------------------------- what is up, and how to use it

_PROMPT = "a red circle above a blue square"


def addresses_table(
    *, grpc: str, http: str, metrics: str, targets: str, workflows: Sequence[str]
) -> RenderableType:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_row(Text("workflows", style="dim"), ", ".join(workflows))
    if http:
        grid.add_row(Text("OpenAI API", style="dim"), f"http://{http}/v1")
    if grpc:
        grid.add_row(Text("gRPC", style="dim"), grpc)
    if metrics:
        grid.add_row(Text("metrics", style="dim"), f"http://{metrics}/metrics")
        grid.add_row("", Text(f"of the nodes: {targets}", style="dim", overflow="fold"))
    return indented(grid)


def commands_to_try(
    *, grpc: str, http: str, workflows: Sequence[str], key_needed: bool
) -> list[str]:
    """To be copied: printed as they are, never wrapped or boxed, for 80 columns."""
    model = workflows[0]
    return [
        *([_generate(model, workflows, key_needed)] if grpc else []),
        *_http(http, model, key_needed),
    ]


def _generate(model: str, workflows: Sequence[str], key_needed: bool) -> str:
    choice = f" -w {model}" if len(workflows) > 1 else ""
    key = " --api-key $OPENAI_API_KEY" if key_needed else ""
    return f'kubediffusion generate{choice}{key} -p "{_PROMPT}" -o out.png'


def _http(http: str, model: str, key_needed: bool) -> tuple[str, ...]:
    if not http:
        return ()
    key = '  -H "Authorization: Bearer $OPENAI_API_KEY" \\\n' if key_needed else ""
    curl = (
        f"curl -s http://{http}/v1/images/generations \\\n{key}"
        "  -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{model}", "prompt": "{_PROMPT}"}}\' |\n'
        '  grep -o \'"b64_json": *"[^"]*\' | cut -d\'"\' -f4 | base64 -d > out.png'
    )
    environment = f"OPENAI_BASE_URL=http://{http}/v1"
    environment += "" if key_needed else " OPENAI_API_KEY=none"
    openai = (
        f"{environment} python3 -c '\n"
        "from openai import OpenAI\n"
        f'answer = OpenAI().images.generate(model="{model}", response_format="url",\n'
        f'                                  prompt="{_PROMPT}")\n'
        "print(answer.data[0].url)'"
    )
    return curl, openai


# ---------------------------------------------------------------- a gateway's status


def status_screen(status: Status, workflows: Sequence[Workflow]) -> RenderableType:
    parts: list[RenderableType] = [workflow_table(workflows), Text(), node_table(status.nodes)]
    parts += [Text(), model_table(status.nodes)]
    if status.unreachable:
        parts += [Text(), Text(f"not answering: {', '.join(status.unreachable)}", style="red")]
    demand = f"{status.running} running, {status.queued} queued, {status.held} held"
    uptime = f"up {_duration(status.uptime_seconds)}"
    parts += [Text(), Text.assemble(demand, (f"   {uptime}", "dim"))]
    return indented(Group(*parts))


def workflow_table(workflows: Sequence[Workflow]) -> Table:
    grid = table("workflow", "state", "loras")
    for workflow in workflows:
        state = Text("ready", style="green") if workflow.ready else Text("waiting", style="yellow")
        if not workflow.ready and workflow.message:
            state.append(f": {workflow.message}", style="dim")
        grid.add_row(workflow.name, state, ", ".join(workflow.loras))
    return grid


def node_table(nodes: Sequence[Node]) -> Table:
    numbers = ("memory", "queued", "running", "tensors")
    grid = table("node", "device", *numbers, numbers=numbers)
    for node in nodes:
        name = Text(node.id)
        if node.draining:
            name.append(" draining", style="yellow")
        tensors = f"{node.tensors} ({decimal(node.tensor_bytes)})" if node.tensors else "0"
        counts = (str(node.queued), str(node.running), tensors)
        grid.add_row(name, node.device, decimal(node.memory_used), *counts)
    return grid


def model_table(nodes: Sequence[Node]) -> Table:
    grid = table("model", "node", "state", "size", numbers=("size",))
    for node in nodes:
        for model in node.models:
            state = Text(model.state, style=_STATE_STYLE.get(model.state, "cyan"))
            if model.message:
                state.append(f": {model.message}", style="dim")
            grid.add_row(model.identity, node.id, state, decimal(model.nbytes))
    return grid


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---------------------------------------------------------------- a workflow file


def workflow_screen(workflow: ResolvedWorkflow) -> RenderableType:
    models = table("model", "class", "dtype", "source")
    for role, ref in workflow.models.items():
        source = ref.uri + (f"/{ref.subfolder}" if ref.subfolder else "")
        at = f" @ {ref.revision[:12]}" if ref.revision else ""
        models.add_row(role, ref.class_name, ref.dtype, Text.assemble(source, (at, "dim")))
    inputs = table("input", "type", "default", "meaning")
    for name, spec in workflow.inputs.items():
        default = "" if spec.default is None else str(spec.default)
        if spec.required:
            default = "required"
        elif spec.default_expression:
            default = "from the model"
        inputs.add_row(name, str(spec.type), Text(default), Text(spec.description, style="dim"))
    parts: list[RenderableType] = [models, Text(), inputs]
    if workflow.loras:
        loras = table("lora", "scale", "source", numbers=("scale",))
        for name, lora in workflow.loras.items():
            loras.add_row(name, f"{lora.scale:g}", lora.uri)
        parts += [Text(), loras]
    return indented(Group(*parts))


# ---------------------------------------------------------------- models


def models_screen(
    builtin: Sequence[Stored],
    downloaded: Sequence[Stored],
    status: Status | None,
    workflows: Sequence[Workflow],
) -> RenderableType:
    parts: list[RenderableType] = []
    for title, models in (("built in", builtin), ("downloaded", downloaded)):
        if models:
            grid = table(title, "size", "commits", numbers=("size",))
            for each in models:
                commits = ", ".join(commit[:12] for commit in each.commits)
                grid.add_row(each.uri, decimal(each.nbytes), Text(commits, style="dim"))
            parts += [grid, Text()]
    if status is not None:
        parts += [workflow_table(workflows), Text(), model_table(status.nodes), Text()]
    return indented(Group(*parts[:-1]) if parts else Text("no models here yet", style="dim"))
