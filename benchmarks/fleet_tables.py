# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of summary.md, made from the CSVs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.fleet_rows import BASELINES, BURST_SETTINGS, DEDICATED, DIFLOW, MARKS, OURS, RESULTS
from kubediffusion.simulate.settings import SETTINGS


def path_of(table: str) -> Path:
    return RESULTS / f"{table}.csv"


def read_rows(table: str) -> list[dict[str, str]]:
    if not path_of(table).exists():
        return []
    with path_of(table).open() as file:
        return list(csv.DictReader(file))


def summary_of(table: str, column: str) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(setting, policy, variant) -> mean, least, most."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in read_rows(table):
        if row.get(column):
            key = (row["setting"], row["policy"], row["variant"])
            groups.setdefault(key, []).append(float(row[column]))
    return {key: (mean(each), min(each), max(each)) for key, each in groups.items()}


def write_summary() -> None:
    lines = [
        "# Policies on the published settings",
        "",
        "Made by `make paper`; see docs/simulate.md. Rows that are not there yet show as –; "
        "`make paper` goes on from the CSVs.",
        "",
    ]
    for column, title in (
        ("overall", "Largest rate with 90 % of all requests on time: mean (least to most)"),
        ("family", "Largest rate with 90 % of every family by itself"),
    ):
        lines += [f"## {title}", "", *_rates_table(column), ""]
    lines += ["## Ratios", "", *_ratios(), ""]
    for column, title in (
        ("one", "Largest burst of one workflow"),
        ("mixed", "Largest mixed burst"),
    ):
        lines += [f"## {title}", "", *_plain("bursts", column, BURST_SETTINGS), ""]
    lines += [
        "## Fewest GPUs for the load that the best of diffusers, shepherd and clockwork carries",
        "", *_plain("gpus", "gpus", BURST_SETTINGS), "",
        "## Variations of kubediffusion: largest rate, all requests", "", *_grid_table(), "",
        "## What models take, GB a GPU", "", *_memory_table(), "",
        "## 600 s instead of 120: largest rate, all requests", "", *_steady_table(), "",
        "## S-d, the mix shifts to four times one family: on time from a minute later on", "",
        *_shifts(), "",
        "## A day with nodes that come and go: on time (GPUs there on average)", "",
        *_days(), "",
        "## Small instances: share of the offline optimum (instances where it is reached)", "",
        *_optimum(), "",
    ]  # fmt: skip
    (RESULTS / "summary.md").write_text("\n".join(lines))


def _header(settings: Sequence[str], first: str = "policy") -> list[str]:
    return [f"| {first} | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]


def _rates_table(column: str) -> list[str]:
    values = summary_of("rates", column)
    out = _header(SETTINGS)
    for policy in (*BASELINES, *DIFLOW, *OURS, "bound"):
        out.append(
            f"| {policy} | "
            + " | ".join(_cell(values.get((s, policy, ""))) for s in SETTINGS)
            + " |"
        )
    return out


def _cell(value: tuple[float, float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"


def _ratios() -> list[str]:
    overall, family = summary_of("rates", "overall"), summary_of("rates", "family")
    out = _header(SETTINGS, "of the mean rates")

    def value(table: Mapping[Any, Any], setting: str, policy: str) -> float:
        return table.get((setting, policy, ""), (float("nan"),))[0]

    for policy in (*BASELINES, *DIFLOW):
        cells = (
            f"{value(overall, s, 'kubediffusion') / value(overall, s, policy):.2f}"
            if value(overall, s, policy) > 0
            else "–"
            for s in SETTINGS
        )
        out.append(f"| kubediffusion / {policy} | " + " | ".join(cells) + " |")
    # Each policy by what it is for.
    for policy, name, table in zip(
        OURS, ("all requests", "by family"), (overall, family), strict=True
    ):
        cells = (
            f"{100 * value(table, s, policy) / value(table, s, 'bound'):.0f} %" for s in SETTINGS
        )
        out.append(f"| {policy} of the bound, {name} | " + " | ".join(cells) + " |")
    cells = (f"{MARKS[s][1]} ({MARKS[s][2]}) %" for s in SETTINGS)
    out.append("| mark: least (aim) | " + " | ".join(cells) + " |")
    return out


def _plain(table: str, column: str, settings: Sequence[str]) -> list[str]:
    values = summary_of(table, column)
    out = _header(settings)
    for policy in (*BASELINES, *DIFLOW, *OURS):
        if any((s, policy, "") in values for s in settings):
            cells = (
                "–" if (s, policy, "") not in values
                else "{:.1f} ({:.0f}–{:.0f})".format(*values[s, policy, ""])
                for s in settings
            )  # fmt: skip
            out.append(f"| {policy} | " + " | ".join(cells) + " |")
    return out


def _cells(label: str, values: Mapping[Any, Any], policy: str, variant: str) -> str:
    cells = (_cell(values.get((s, policy, variant))) for s in SETTINGS)
    return f"| {label} | " + " | ".join(cells) + " |"


def _grid_table() -> list[str]:
    values, base = summary_of("grid", "overall"), summary_of("rates", "overall")
    out = [*_header(SETTINGS, "variation"), _cells("as above", base, "kubediffusion", "")]
    for variant in dict.fromkeys(key[2] for key in values):
        policy = variant if variant == DEDICATED else "kubediffusion"
        out.append(_cells(variant, values, policy, variant))
    return out


def _memory_table() -> list[str]:
    """At the largest rate, the most that was ever held."""
    values = summary_of("grid", "gigabytes")
    return [
        *_header(SETTINGS, "arrangement"),
        _cells("planned, in all the memory", values, "kubediffusion", "grpc"),
        _cells("lean", values, "kubediffusion", "lean"),
        _cells("dedicated", values, DEDICATED, DEDICATED),
    ]


def _steady_table() -> list[str]:
    values = summary_of("grid", "overall")
    policies = dict.fromkeys(key[1] for key in values if key[2] == "600s")
    return [*_header(SETTINGS), *(_cells(each, values, each, "600s") for each in policies)]


def _days() -> list[str]:
    shares, nodes = summary_of("autoscale", "attainment"), summary_of("autoscale", "nodes")
    out = _header(SETTINGS, "seconds until a node serves")
    for variant in sorted(
        {key[2] for key in shares}, key=lambda each: (each != "always", len(each))
    ):
        keys = [(s, "kubediffusion", variant) for s in SETTINGS]
        cells = (
            f"{100 * shares[key][0]:.1f} % ({nodes[key][0]:.1f})" if key in shares else "–"
            for key in keys
        )
        out.append(f"| {variant} | " + " | ".join(cells) + " |")
    return out


def _shifts() -> list[str]:
    columns = ("follows", "told", "stays")
    values = {column: summary_of("shift", column) for column in columns}
    out = [
        "| four times | follows | planned for that mix | plan stays | follows / planned |",
        "|---|---|---|---|---|",
    ]
    for key in values["told"]:
        cells = [values[column][key][0] for column in columns]
        shares = " | ".join(f"{each:.3f}" for each in cells)
        out.append(f"| {key[2]} | {shares} | {cells[0] / cells[1]:.3f} |")
    return out


def _optimum() -> list[str]:
    from benchmarks.fleet_optimum import table

    rows = read_rows("optimum")
    return table(rows) if rows else []
