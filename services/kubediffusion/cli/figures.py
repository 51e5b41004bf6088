# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of `kubediffusion simulate --report`: one page that compares policies."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubediffusion.errors import InvalidInput

if TYPE_CHECKING:
    from kubediffusion.simulate.scenario import Result, Scenario

# Attainment is drawn at these multiples of the rate that was asked for.
CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def write_report(
    path: Path, scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]
) -> None:
    """One HTML file with everything in it. Raises InvalidInput without matplotlib."""
    plt = _pyplot()
    from kubediffusion.simulate.scenario import simulate

    traced = replace(scenario.options, timeline=True)
    results = {
        policy: simulate(replace(scenario, policy=policy, seed=seeds[0], options=traced))
        for policy in policies
    }
    parts = [_table(results), _picture(plt, _curves(plt, scenario, policies, seeds))]
    for policy, result in results.items():
        parts.append(f"<h2>{html.escape(policy)}</h2>")
        parts.append(_picture(plt, _timeline(plt, result)))
    path.write_text(_PAGE.format(title=_title(scenario), body="\n".join(parts)))


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InvalidInput(
            "--report draws with matplotlib, which comes with the extra: "
            "pip install 'kubediffusion[bench]'; --json and --csv work without it"
        ) from error
    return plt


def _title(scenario: Scenario) -> str:
    return html.escape(
        f"{scenario.setting.name}: {scenario.nodes} GPUs at {scenario.rate:g} times the trace"
    )


def _table(results: dict[str, Result]) -> str:
    rows = [
        "<tr><th>policy<th>on time<th>worst family<th>bound<th>shed<th>median s<th>95 % s"
        "<th>GPU s<th>loads<th>peak GB</tr>"
    ]
    for policy, result in results.items():
        content: dict[str, Any] = result.as_dict()
        latency, out = content["latency"], result.outcome
        numbers = (
            f"{result.attainment:.1%}",
            f"{result.worst_family:.1%}",
            f"{result.bound:.1%}",
            str(len(out.shed)),
            f"{latency['p50'] or 0:.2f}",
            f"{latency['p95'] or 0:.2f}",
            f"{out.gpu_seconds:.0f}",
            str(out.loads),
            f"{out.peak_bytes / 1e9:.0f}",
        )
        rows.append(f"<tr><td>{html.escape(policy)}<td>" + "<td>".join(numbers) + "</tr>")
    return "<table>" + "".join(rows) + "</table>"


def _curves(plt: Any, scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]) -> Any:
    from kubediffusion.simulate.scenario import simulate

    figure, axes = plt.subplots(figsize=(7, 3.5))
    rates = [scenario.rate * each for each in CURVE]
    bounds: list[float] = []
    for policy in policies:
        shares: list[float] = []
        bounds = []
        for rate in rates:
            runs = [
                simulate(replace(scenario, policy=policy, rate=rate, seed=seed)) for seed in seeds
            ]
            shares.append(sum(run.attainment for run in runs) / len(runs))
            bounds.append(sum(run.bound for run in runs) / len(runs))
        axes.plot(rates, shares, marker="o", label=policy)
    axes.plot(rates, bounds, "k--", label="bound")
    axes.axhline(0.9, color="grey", linewidth=0.5)
    axes.set(xlabel="rate (times the trace)", ylabel="on time", ylim=(0, 1.02))
    axes.legend()
    return figure


def _timeline(plt: Any, result: Result) -> Any:
    """Who ran what on each GPU, what models took, and how many requests waited."""
    outcome = result.outcome
    figure, (gpus, memory, queue) = plt.subplots(
        3, 1, figsize=(10, 6.5), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    families = {job.id: job.pipeline.family for job in result.jobs}
    names = sorted(set(families.values()))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for span in outcome.spans:
        colour = "black" if span.kind == "load" else colours[families[span.jobs[0]]]
        gpus.broken_barh(
            [(span.start, span.end - span.start)], (span.node - 0.4, 0.8), facecolors=colour
        )
    gpus.set(ylabel="GPU (black: a load)")
    gpus.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names],
        labels=names, loc="upper right", fontsize="small",
    )  # fmt: skip
    moments, held = _held(result)
    memory.step(moments, held, where="post")
    memory.set(ylabel="models, GB", ylim=(0, None))
    moments, waiting = _waiting(result)
    queue.step(moments, waiting, where="post")
    queue.set(xlabel="seconds", ylabel="waiting")
    return figure


def _held(result: Result) -> tuple[list[float], list[float]]:
    """What models take of all GPUs together, over time."""
    moments, sums = list[float](), list[float]()
    now: dict[int, float] = {}
    for at, node, nbytes in result.outcome.memory:
        now[node] = nbytes
        moments.append(at)
        sums.append(sum(now.values()) / 1e9)
    return [*moments, result.outcome.end], [*sums, *sums[-1:]]


def _waiting(result: Result) -> tuple[list[float], list[int]]:
    """Requests that are neither running nor over, over time."""
    changes: list[tuple[float, int]] = [(job.arrival, 1) for job in result.jobs]
    changes += [(at, -1) for at in result.outcome.finished.values()]
    changes += [(at, -1) for at in result.outcome.shed.values()]
    for span in result.outcome.spans:
        if span.kind == "run":
            changes += [(span.start, -len(span.jobs)), (span.end, len(span.jobs))]
    changes.sort()
    moments, counts, now = [0.0], [0], 0
    for at, change in changes:
        now += change
        moments.append(at)
        counts.append(max(0, now))
    return moments, counts


def _picture(plt: Any, figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{content}">'


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .2em .7em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} tr {{ border-bottom: 1px solid #ccc; }}
img {{ max-width: 100%; }}
</style>
<h1>{title}</h1>
{body}
"""
