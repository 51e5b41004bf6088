#!/usr/bin/env python3
# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Grafana's dashboard, written as code: scripts/dashboards.py [--check | --draw URL FILE.png].

Writes charts/kubediffusion/dashboards/*.json; --check writes nothing and fails where they differ.
--draw asks the Prometheus at URL for the last minutes of every panel, and draws the answers (needs
matplotlib): a look at the dashboard without Grafana.
Every expression names metrics of `kubediffusion.telemetry.metrics`, which a test sees to.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

FOLDER = Path(__file__).resolve().parents[1] / "charts/kubediffusion/dashboards"
DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# Grafana's grid is 24 wide.
THIRD, HEIGHT = 8, 7
# Of every series of the chosen namespaces, and of those with a workflow.
N = 'namespace=~"$namespace"'
W = 'namespace=~"$namespace", workflow=~"$workflow"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """Some curves over time. `queries` are (legend, PromQL)."""

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False


def quantile(q: float, metric: str, by: str, where: str = N) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{where}}}{RATE})))"


def mean(metric: str, by: str, where: str = N) -> str:
    total = f"sum by ({by}) (rate({metric}_sum{{{where}}}{RATE}))"
    return f"{total} / sum by ({by}) (rate({metric}_count{{{where}}}{RATE}))"


def per_second(metric: str, by: str = "", where: str = N) -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{where}}}{RATE}))"


REQUESTS = (
    Panel(
        "Requests by outcome",
        "failed is ours; refused, late and cancelled are the client's; shed was refused in time.",
        "reqps",
        (("{{outcome}}", per_second("kubediffusion_gateway_requests_total", "outcome", W)),),
        stacked=True,
    ),
    Panel(
        "Time to the image",
        "Of requests that succeeded.",
        "s",
        tuple(
            (
                f"{{{{workflow}}}} p{int(q * 100)}",
                quantile(
                    q,
                    "kubediffusion_gateway_request_seconds",
                    "workflow",
                    f'{W}, outcome="succeeded"',
                ),
            )
            for q in (0.5, 0.95)
        ),
    ),
    Panel(
        "Requests in the system",
        "held: a model has no node. queued: its tasks wait for a node to take them.",
        "short",
        (("{{state}}", f"sum by (state) (kubediffusion_gateway_requests_now{{{W}}})"),),
        stacked=True,
    ),
    Panel(
        "Shed",
        "Requests refused because they could not be served in time, by reason.",
        "reqps",
        (
            (
                "{{workflow}} {{reason}}",
                per_second("kubediffusion_gateway_shed_total", "workflow, reason", W),
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Where the time goes",
        "Mean time from handing a task out to its end, by stage.",
        "s",
        (
            (
                "{{workflow}} {{stage}}",
                mean("kubediffusion_gateway_stage_seconds", "workflow, stage", W),
            ),
        ),
    ),
    Panel(
        "Workflows that are ready",
        "1 while every model has a node. A workflow that is scaled to zero is not ready at rest.",
        "short",
        (("{{workflow}}", f"min by (workflow) (kubediffusion_gateway_workflow_ready{{{W}}})"),),
    ),
)

MODELS = (
    Panel(
        "Demand",
        "What the autoscaler reads: tasks in the system, held ones included.",
        "short",
        (("{{model}}", f"sum by (model) (kubediffusion_gateway_model_tasks{{{N}}})"),),
        stacked=True,
    ),
    Panel(
        "Nodes that have the model",
        "Ready ones.",
        "short",
        (("{{model}}", f'sum by (model) (kubediffusion_node_model_state{{{N}, state="ready"}})'),),
    ),
    Panel(
        "Tasks at work, per node",
        "1 is a device that never rests; more, where requests share a forward.",
        "short",
        (
            (
                "{{model}}",
                f"{per_second('kubediffusion_node_task_run_seconds_sum', 'model')} / "
                f'sum by (model) (kubediffusion_node_model_state{{{N}, state="ready"}})',
            ),
        ),
    ),
    Panel(
        "Waiting for the device",
        "95 % of the tasks wait no longer at their node.",
        "s",
        (
            (
                "{{model}} {{stage}}",
                quantile(0.95, "kubediffusion_node_task_queue_seconds", "model, stage"),
            ),
        ),
    ),
    Panel(
        "Run time of a task",
        "Median and 95th percentile of device time.",
        "s",
        tuple(
            (
                f"{{{{model}}}} {{{{stage}}}} p{int(q * 100)}",
                quantile(q, "kubediffusion_node_task_run_seconds", "model, stage"),
            )
            for q in (0.5, 0.95)
        ),
    ),
    Panel(
        "Denoising steps",
        "A second, and how many requests share one.",
        "short",
        (
            ("{{model}} steps/s", per_second("kubediffusion_node_denoise_steps_total", "model")),
            (
                "{{model}} batch",
                mean("kubediffusion_node_batch_size", "model", f'{N}, stage="denoise"'),
            ),
        ),
    ),
    Panel(
        "Steps shared between nodes",
        "Parts that another node computed, a second; leases that nodes help now; helpers that did "
        "not last.",
        "short",
        (
            (
                "{{model}} {{stage}}",
                per_second("kubediffusion_node_assisted_steps_total", "model, stage"),
            ),
            ("helped now", f"sum(kubediffusion_node_helping{{{N}}})"),
            (
                "{{outcome}}",
                per_second("kubediffusion_node_assists_total", "outcome", f'{N}, outcome!="done"'),
            ),
            (
                "{{model}} waits, seconds a lease",
                mean("kubediffusion_node_helper_wait_seconds", "model"),
            ),
        ),
    ),
    Panel(
        "Tokens kept",
        "Of the image tokens that came to prunable blocks, in pruned requests.",
        "percentunit",
        (
            (
                "{{model}}",
                per_second("kubediffusion_node_image_tokens_total", "model", f'{N}, outcome="kept"')
                + " / "
                + per_second("kubediffusion_node_image_tokens_total", "model"),
            ),
        ),
    ),
    Panel(
        "Steps left out",
        "Of denoising steps, the share that step caches reused.",
        "percentunit",
        (
            (
                "{{model}}",
                per_second("kubediffusion_node_steps_reused_total", "model")
                + " / "
                + per_second("kubediffusion_node_denoise_steps_total", "model"),
            ),
        ),
    ),
    Panel(
        "Compiled blocks",
        "Graphs of each node, and seconds a second spent on making some: none once it is ready.",
        "short",
        (
            ("{{pod}} graphs", f"sum by (pod) (kubediffusion_node_compiled_graphs{{{N}}})"),
            (
                "{{model}} compiling",
                per_second("kubediffusion_node_compile_seconds_total", "model"),
            ),
        ),
    ),
)

NODES = (
    Panel(
        "Weights in memory",
        "By model, over its nodes.",
        "bytes",
        (("{{model}}", f"sum by (model) (kubediffusion_node_model_resident_bytes{{{N}}})"),),
        stacked=True,
    ),
    Panel(
        "Tensors kept for requests",
        "They go when their request ends, or its gateway is silent for too long.",
        "bytes",
        (("{{pod}}", f"sum by (pod) (kubediffusion_node_tensor_bytes{{{N}}})"),),
    ),
    Panel(
        "Tensors between nodes",
        "Sent by gRPC.",
        "Bps",
        (("{{pod}}", per_second("kubediffusion_node_fetched_bytes_total", "pod")),),
        stacked=True,
    ),
    Panel(
        "Loading weights, fetching inputs",
        "95th percentile.",
        "s",
        (
            ("load {{model}}", quantile(0.95, "kubediffusion_node_model_load_seconds", "model")),
            (
                "inputs of {{stage}}",
                quantile(0.95, "kubediffusion_node_task_fetch_seconds", "stage"),
            ),
        ),
    ),
    Panel(
        "What went wrong",
        "Tasks that failed or were declined at nodes run again elsewhere; loads are tried again.",
        "ops",
        (
            (
                "load of {{model}}: {{reason}}",
                per_second("kubediffusion_node_model_load_failures_total", "model, reason"),
            ),
            ("failed: {{reason}}", per_second("kubediffusion_node_failures_total", "reason")),
            (
                "declined: {{reason}}",
                per_second("kubediffusion_node_tasks_declined_total", "reason"),
            ),
            (
                "handed out again: {{reason}}",
                per_second("kubediffusion_gateway_tasks_retried_total", "reason"),
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Leases",
        "Given back at a step boundary, resumed elsewhere; steps that ran twice.",
        "ops",
        (
            ("yielded", per_second("kubediffusion_node_leases_yielded_total")),
            ("made way", per_second("kubediffusion_node_leases_preempted_total")),
            ("resumed", per_second("kubediffusion_gateway_tasks_resumed_total")),
            ("steps repeated", per_second("kubediffusion_gateway_steps_repeated_total")),
        ),
    ),
)

CONTROL = (
    Panel(
        "Workflows and models",
        "As the operator sees them.",
        "short",
        (
            ("workflows {{state}}", f"sum by (state) (kubediffusion_operator_workflows{{{N}}})"),
            ("models {{state}}", f"sum by (state) (kubediffusion_operator_models{{{N}}})"),
        ),
    ),
    Panel(
        "Reconciling",
        "One namespace, 95th percentile; and the age of the operator's last heartbeat.",
        "s",
        (
            ("{{outcome}}", quantile(0.95, "kubediffusion_operator_reconcile_seconds", "outcome")),
            ("heartbeat", f"max (kubediffusion_operator_heartbeat_age_seconds{{{N}}})"),
        ),
    ),
    Panel(
        "Writes, and errors of the API server",
        "At rest there are none.",
        "ops",
        (
            ("{{verb}} {{kind}}", per_second("kubediffusion_operator_writes_total", "verb, kind")),
            (
                "{{verb}}: {{code}}",
                per_second("kubediffusion_operator_api_errors_total", "verb, code"),
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Nodes as gateways see them",
        "unreachable: there, by the API server, and silent.",
        "short",
        (("{{pod}} {{state}}", f"sum by (pod, state) (kubediffusion_gateway_nodes{{{N}}})"),),
    ),
    Panel(
        "Answers by HTTP",
        "By code.",
        "reqps",
        (("{{code}}", per_second("kubediffusion_gateway_http_requests_total", "code")),),
        stacked=True,
    ),
    Panel(
        "Targets",
        "Pods whose metrics cannot be read. While there are any, nothing is scaled down.",
        "short",
        (("{{component}} down", f'sum by (component) (up{{job="kubediffusion", {N}}} == bool 0)'),),
    ),
)

ROWS = {
    "Requests": REQUESTS,
    "Models": MODELS,
    "Nodes": NODES,
    "Control plane": CONTROL,
}


def build() -> str:
    """The dashboard as Grafana imports it."""
    board = (
        dashboard.Dashboard("KubeDiffusion")
        .uid("kubediffusion")
        .description("Requests, the models that serve them, their nodes, and the control plane.")
        .tags(["kubediffusion"])
        .time("now-1h", "now")
        .refresh("10s")
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .with_variable(_choice("namespace", "kubediffusion_gateway_nodes"))
        .with_variable(_choice("workflow", f"kubediffusion_gateway_workflow_ready{{{N}}}"))
    )
    numbers = count(1)
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board = board.with_panel(_panel(panel).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def _choice(name: str, series: str) -> dashboard.QueryVariable:
    """One or several values of a label; all of them to begin with."""
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(DATASOURCE)
        .query(f"label_values({series}, {name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.text)
        .datasource(DATASOURCE)
        .unit(panel.unit)
        .min(0)
        .span(THIRD)
        .height(HEIGHT)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 0)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    for index, (legend, expression) in enumerate(panel.queries):
        built = built.with_target(
            prometheus.Dataquery()
            .expr(expression)
            .legend_format(legend)
            .ref_id(chr(ord("A") + index))
        )
    return built


def draw(url: str, file: Path, minutes: float = 10.0) -> None:
    """All panels with what Prometheus answers, as near to Grafana's look as it needs to be."""
    import matplotlib.pyplot as plt

    rows = list(ROWS.items())
    lines = sum(-(-len(panels) // 3) for _, panels in rows)
    figure, axes = plt.subplots(lines, 3, figsize=(21, 3.1 * lines), layout="constrained")
    shown = iter(axes.flat)
    for row, panels in rows:
        for panel in panels:
            _draw_panel(next(shown), url, f"{row}: {panel.title}", panel, minutes)
    for rest in shown:
        rest.axis("off")
    figure.savefig(file, dpi=70)


def _draw_panel(axis: Any, url: str, title: str, panel: Panel, minutes: float) -> None:
    now = time.time()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for legend, expression in panel.queries:
        text = expression.replace("$__rate_interval", "30s")
        text = text.replace("$namespace", ".*").replace("$workflow", ".*")
        asked = {"query": text, "start": now - 60 * minutes, "end": now, "step": 2}
        address = f"{url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address) as answer:
            for series in json.load(answer)["data"]["result"]:
                labels: dict[str, str] = series["metric"]
                name = re.sub(r"{{(\w+)}}", lambda m, by=labels: by.get(m[1], ""), legend)
                values = [(float(at) - now, float(value)) for at, value in series["values"]]
                curves[name] = ([at for at, _ in values], [value for _, value in values])
    for name, (at, values) in curves.items():
        axis.plot(at, values, linewidth=1, label=name)
        if panel.stacked:
            axis.fill_between(at, values, alpha=0.15)
    axis.set_title(f"{title} ({panel.unit})", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    if curves:
        axis.legend(fontsize=6, loc="upper left")
    else:
        axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes)


def main(arguments: Sequence[str]) -> None:
    text, file = build(), FOLDER / "kubediffusion.json"
    match list(arguments):
        case []:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text)
        case ["--check"]:
            if not file.exists() or file.read_text() != text:
                sys.exit(f"{file.name} differs from scripts/dashboards.py: run it and commit")
        case ["--draw", url, picture]:
            draw(url, Path(picture))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
