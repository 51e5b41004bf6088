# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion simulate`: a fleet that does not exist yet, under load that it may get."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kubediffusion.cli import shell
from kubediffusion.errors import InvalidInput

if TYPE_CHECKING:
    from kubediffusion.simulate.autoscale import Autoscaling
    from kubediffusion.simulate.scenario import Result, Scenario


@dataclass(frozen=True)
class Asked:
    """The options as typed. Everything that is None has a default that depends on the others."""

    setting: str
    policies: Sequence[str]
    trace: Path | None
    profiles: Path | None
    gpus: int | None
    rate: float
    seeds: Sequence[int]
    arrivals: str
    slo_scale: float | None
    gateways: int
    report_ms: float
    noise: float
    dit_scale: float
    pinned: bool
    lost: Sequence[str]
    transfers: Path | None
    node_gb: float | None
    autoscale: str | None
    startup: float
    target: float
    sweep: str | None
    judge: str
    json: Path | None
    csv: Path | None
    report: Path | None


def register(app: typer.Typer) -> None:
    app.command(name="simulate")(_command)


def _command(
    setting: Annotated[str, typer.Option(help="S-a to S-g, or a YAML file.")] = "S-a",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; default kubediffusion.", metavar="NAME"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines of LABEL GAP; default: published.")
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measured costs; default: published, H800.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Instead of the setting's.")] = None,
    rate: Annotated[float, typer.Option(min=0.0, help="Times the trace's own rate.")] = 1.0,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable; default 0.")] = None,
    arrivals: Annotated[str, typer.Option(help="trace, poisson, mmpp or wave.")] = "trace",
    slo_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Deadline, in solo times.")
    ] = None,
    gateways: Annotated[int, typer.Option(min=1, help="That share the nodes.")] = 1,
    report_ms: Annotated[
        float, typer.Option(min=0.0, help="Age of what gateways know of each other's work.")
    ] = 100.0,
    noise: Annotated[float, typer.Option(min=0.0, help="Deviation of log run times.")] = 0.0,
    dit_scale: Annotated[
        float, typer.Option(min=0.01, help="Time of the denoisers, as pruning makes it: 0.6.")
    ] = 1.0,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Loads from pinned memory, five times as fast.")
    ] = False,
    lost: Annotated[
        list[str] | None,
        typer.Option(metavar="GPU@SECONDS", help="A GPU that is lost then. Repeatable."),
    ] = None,
    transfers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measured transfers of another transport.")
    ] = None,
    node_gb: Annotated[
        float | None, typer.Option(min=0.1, help="What models may take of a GPU: lean nodes.")
    ] = None,
    autoscale: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", help="Nodes come and go by demand, within these."),
    ] = None,
    startup: Annotated[
        float, typer.Option(min=0.0, help="Seconds until a new node serves.")
    ] = 30.0,
    target: Annotated[
        float, typer.Option(min=0.01, help="Requests in the system that a node is meant for.")
    ] = 1.0,
    sweep: Annotated[
        str | None, typer.Option(help="rate, burst or gpus: the most (or fewest) for 90 %.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="overall, or family: each by itself must reach 90 %.")
    ] = "overall",
    out: Annotated[Path | None, typer.Option("--json", metavar="OUT")] = None,
    table: Annotated[Path | None, typer.Option("--csv", metavar="OUT")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="One page with pictures.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Replay a trace against a fleet that exists only as profiles."""
    with shell.reporting(debug):
        run(
            Asked(
                setting, policy or ["kubediffusion"], trace, profiles, gpus, rate, seed or [0],
                arrivals, slo_scale, gateways, report_ms, noise, dit_scale, pinned, lost or [],
                transfers, node_gb, autoscale, startup, target, sweep, judge, out, table, report,
            )
        )  # fmt: skip


def run(asked: Asked) -> None:
    scenario = scenario_of(asked)
    rows = [
        row
        for policy in asked.policies
        for seed in asked.seeds
        for row in [_row(asked, replace(scenario, policy=policy, seed=seed))]
    ]
    if asked.json is not None:
        content = rows[0] if len(rows) == 1 else rows
        asked.json.write_text(json.dumps(content, indent=2) + "\n")
    if asked.csv is not None:
        _write_csv(asked.csv, rows)
    if asked.report is not None:
        from kubediffusion.cli.figures import write_report

        write_report(asked.report, scenario, asked.policies, asked.seeds)
    _show(rows, asked)


def _row(asked: Asked, scenario: Scenario) -> dict[str, Any]:
    from kubediffusion.simulate.scenario import simulate
    from kubediffusion.simulate.sweep import (
        every_family,
        overall,
        sweep_burst,
        sweep_gpus,
        sweep_rate,
    )

    head = {
        "setting": scenario.setting.name,
        "policy": scenario.policy,
        "seed": scenario.seed,
        "gpus": scenario.nodes,
        "rate": scenario.rate,
    }
    judge = every_family if asked.judge == "family" else overall
    if asked.sweep == "rate":
        return head | {"rate": sweep_rate(scenario, judge)}
    if asked.sweep == "gpus":
        return head | {"gpus": sweep_gpus(scenario, judge)}
    if asked.sweep == "burst":
        return head | {"burst": sweep_burst(replace(scenario, arrivals="poisson"), None)}
    result: Result = simulate(scenario)
    return head | result.as_dict()


def scenario_of(asked: Asked) -> Scenario:
    """Reads the files. Raises InvalidInput with the name of what is wrong."""
    from kubediffusion.simulate.fleet import POLICIES
    from kubediffusion.simulate.outcome import Fault, Options
    from kubediffusion.simulate.scenario import Scenario
    from kubediffusion.simulate.settings import costs_of, published_setting, setting_of, tables_of
    from kubediffusion.simulate.workload import parse_trace

    for policy in asked.policies:
        _one_of("--policy", policy, POLICIES)
    _one_of("--arrivals", asked.arrivals, ("trace", "poisson", "mmpp", "wave"))
    _one_of("--judge", asked.judge, ("overall", "family"))
    if asked.sweep is not None:
        _one_of("--sweep", asked.sweep, ("rate", "burst", "gpus"))
    folder = asked.profiles or published_data()
    transfers = asked.transfers or folder / "transfer_profiles.json"
    costs = costs_of(read_json(folder / "model_profiles.json"), read_json(transfers))
    if asked.pinned:
        costs.load_scale = 0.2
    tables_file = folder / "scheduler_tables.json"
    tables = tables_of(read_json(tables_file) if tables_file.exists() else {})
    trace_file = asked.trace or published_data() / "trace_rs1.0_t120.txt"
    trace = parse_trace(_read(trace_file), str(trace_file))
    named = Path(asked.setting)
    if named.suffix in (".yaml", ".yml", ".json"):
        setting = setting_of(_read_yaml(named), named.stem)
    else:
        setting = published_setting(asked.setting)
    solo_costs = None
    if asked.dit_scale != 1.0:
        solo_costs = costs
        denoisers = {each.denoiser: asked.dit_scale for each in setting.families.all()}
        costs = costs.scaled(denoisers)
    faults = tuple(Fault(seconds, gpu) for gpu, seconds in map(_lost, asked.lost))
    options = Options(
        noise=asked.noise,
        seed=asked.seeds[0],
        report_interval=asked.report_ms / 1000 if asked.gateways > 1 else 0.0,
        faults=faults,
    )
    return Scenario(
        setting,
        costs,
        trace,
        asked.policies[0],
        rate=asked.rate,
        seed=asked.seeds[0],
        gpus=asked.gpus,
        gateways=asked.gateways,
        slo_scale=asked.slo_scale,
        arrivals=asked.arrivals,
        options=options,
        tables=tables,
        solo_costs=solo_costs,
        parameters={} if asked.node_gb is None else {"node_bytes": asked.node_gb * 1e9},
        autoscaling=_autoscaling(asked),
    )


def _autoscaling(asked: Asked) -> Autoscaling | None:
    if asked.autoscale is None:
        return None
    from kubediffusion.scaling import Limits
    from kubediffusion.simulate.autoscale import Autoscaling

    least, _, most = asked.autoscale.partition(":")
    try:
        limits = Limits(int(least), int(most), asked.target)
    except ValueError as error:
        raise InvalidInput(f"--autoscale {asked.autoscale}: write MIN:MAX, such as 2:8") from error
    if not 1 <= limits.minimum <= limits.maximum:
        raise InvalidInput(f"--autoscale {asked.autoscale}: write MIN:MAX with 1 <= MIN <= MAX")
    return Autoscaling(limits, startup=asked.startup)


def _one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidInput(f"{option} {value}: take one of {', '.join(allowed)}")


def _lost(text: str) -> tuple[int, float]:
    gpu, _, seconds = text.partition("@")
    try:
        return int(gpu), float(seconds)
    except ValueError as error:
        raise InvalidInput(f"--lost {text}: write GPU@SECONDS, such as 3@60") from error


def published_data() -> Path:
    """The published measurements of a source checkout."""
    folder = Path(__file__).parents[3] / "benchmarks" / "data" / "h800"
    if not folder.is_dir():
        raise InvalidInput(
            "the published profiles and trace are part of a source checkout only: "
            "give --profiles DIR and --trace FILE"
        )
    return folder


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{path}: not JSON: {error}") from error


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: a mapping with gpus and families or workflows is expected")
    return content


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def _show(rows: Sequence[Mapping[str, Any]], asked: Asked) -> None:
    from rich.table import Table

    sweep = asked.sweep
    columns = ["policy", "seed", "gpus", "rate"]
    columns += ["burst"] if sweep == "burst" else []
    columns += [] if sweep else ["attainment", "bound", "shed", "requests"]
    table = Table(*columns, title=f"{rows[0]['setting']}" if rows else None)
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    shell.output().print(table)
