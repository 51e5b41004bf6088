# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The commands and their options. Importing this must stay cheap: `--help` is typed often."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kubediffusion.cli import revisions, shiva, simulate
from kubediffusion.cli.shell import reporting

HELP = """Text-to-image diffusion, served a model at a time.

A workflow file names a pipeline; its models become node processes. [bold]run[/bold] draws one
picture from a file, [bold]up[/bold] keeps serving, [bold]generate[/bold] asks what is up."""

app = typer.Typer(
    name="kubediffusion",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DRAWING, _SERVING, _OTHER = "What to draw", "Nodes", "Other"

Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="What to draw.", rich_help_panel=_DRAWING)
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Of the random numbers: the same seed, the same picture.", rich_help_panel=_DRAWING
    ),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_DRAWING)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any input of the workflow; @FILE for a file's content. Repeatable.",
        rich_help_panel=_DRAWING,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME=SCALE",
        help="A declared LoRA. Repeatable.",
        rich_help_panel=_DRAWING,
    ),
]
SourceImage = Annotated[
    Path | None,
    typer.Option(
        "--image", metavar="FILE", help="A picture to start from.", rich_help_panel=_DRAWING
    ),
]
Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="NAME=FILE",
        help="A ControlNet's control picture. Repeatable.",
        rich_help_panel=_DRAWING,
    ),
]
Count = Annotated[
    int,
    typer.Option(
        "-n", min=1, max=64, help="Pictures, with seeds s, s+1, …", rich_help_panel=_DRAWING
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Mean share of tokens that a pruned transformer keeps; 1 for all.",
        rich_help_panel=_DRAWING,
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE.png", help="Where the picture goes.")
]
WorkflowFile = Annotated[
    Path, typer.Option("--file", "-f", metavar="FILE", help="A DiffusionWorkflow.")
]
WorkflowFiles = Annotated[
    list[Path],
    typer.Option("--file", "-f", metavar="FILE", help="A DiffusionWorkflow. Repeatable."),
]
Replicas = Annotated[
    list[str] | None,
    typer.Option(
        "--replicas",
        metavar="ROLE=N",
        help="Nodes for a role, such as transformer=2. Repeatable.",
        rich_help_panel=_SERVING,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        "--policy",
        envvar="KUBEDIFFUSION_POLICY",
        show_envvar=True,
        help="Who says what runs where: queue, kubediffusion or kubediffusion-fair.",
        rich_help_panel=_SERVING,
    ),
]
Address = Annotated[
    str,
    typer.Option(help="A gateway's gRPC address; that of a running `up` is known."),
]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="KUBEDIFFUSION_API_KEY",
        show_envvar=True,
        help="For a gateway that asks for one.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="For a program to read.", rich_help_panel=_OTHER)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show where an error came from.", rich_help_panel=_OTHER)
]


@app.command()
def run(
    file: WorkflowFile,
    prompt: Prompt = None,
    output: Output = Path("out.png"),
    seed: Seed = None,
    steps: Steps = None,
    settings: Settings = None,
    lora: Loras = None,
    image: SourceImage = None,
    control: Controls = None,
    n: Count = 1,
    budget: Budget = None,
    replicas: Replicas = None,
    policy: Policy = "queue",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Start the workflow's nodes on this machine, draw, and stop them again."""
    with reporting(debug):
        from kubediffusion.cli.inputs import Typed, read_replicas
        from kubediffusion.cli.run import Here, run_here
        from kubediffusion.scheduling.policies.live import known_policy

        typed = Typed(
            prompt, seed, steps, settings or (), lora or (), image, control or (), n, budget
        )
        here = Here(read_replicas(replicas or ()), known_policy(policy))
        run_here(file, typed, output, here, as_json=as_json)


@app.command()
def generate(
    prompt: Prompt = None,
    output: Output = Path("out.png"),
    workflow: Annotated[
        str, typer.Option("--workflow", "-w", help="Needed where more than one is served.")
    ] = "",
    address: Address = "",
    api_key: ApiKey = "",
    seed: Seed = None,
    steps: Steps = None,
    settings: Settings = None,
    lora: Loras = None,
    image: SourceImage = None,
    control: Controls = None,
    n: Count = 1,
    budget: Budget = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw with a gateway that is running: `kubediffusion up`, or one in a cluster."""
    with reporting(debug):
        from kubediffusion.cli.inputs import Typed
        from kubediffusion.cli.remote import gateway_address
        from kubediffusion.cli.run import run_there

        typed = Typed(
            prompt, seed, steps, settings or (), lora or (), image, control or (), n, budget
        )
        run_there(
            gateway_address(address), workflow, typed, output, as_json=as_json, api_key=api_key
        )


@app.command()
def up(
    files: WorkflowFiles,
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="OpenAI's images API; 'off' for none.")
    ] = "127.0.0.1:8430",
    grpc: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="For generate, status and the Python client.")
    ] = "127.0.0.1:8431",
    metrics: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Prometheus; 'off' for none.")
    ] = "127.0.0.1:8432",
    replicas: Replicas = None,
    policy: Policy = "queue",
    profiles: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run times to begin with, as `profile` wrote them.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="KUBEDIFFUSION_API_KEYS",
            help="Ask clients for one of these keys. Repeatable.",
        ),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for requests under way when stopping.")
    ] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve workflows on this machine until Ctrl-C."""
    with reporting(debug):
        from kubediffusion.cli.inputs import read_replicas
        from kubediffusion.cli.up import Serving, serve
        from kubediffusion.scheduling.policies.live import known_policy

        serve(
            Serving(
                files=files,
                http=http,
                grpc=grpc,
                metrics=metrics,
                replicas=read_replicas(replicas or ()),
                policy=known_policy(policy),
                profiles=profiles,
                api_keys=frozenset(api_key or ()),
                drain_seconds=drain,
            )
        )


@app.command()
def validate(
    files: WorkflowFiles,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline/--check-sources",
            help="Check the file alone, or look into its sources too: classes, graph, inputs.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check workflow files without loading anything."""
    with reporting(debug):
        from kubediffusion.cli.check import validate_files

        validate_files(files, offline=offline, as_json=as_json)


@app.command()
def status(
    address: Address = "", api_key: ApiKey = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Show the workflows, nodes, models and queues of a running gateway."""
    with reporting(debug):
        from kubediffusion.cli.remote import gateway_address, show_status

        show_status(gateway_address(address), as_json, api_key)


@app.command()
def models(
    address: Address = "", api_key: ApiKey = "", as_json: Json = False, debug: Debug = False
) -> None:
    """List the models that come with KubeDiffusion, and those that are served or downloaded."""
    with reporting(debug):
        from kubediffusion.cli.remote import show_models

        show_models(address, as_json, api_key)


@app.command()
def profile(
    file: WorkflowFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")
    ] = Path("out/profile"),
    prompt: Prompt = "a red circle above a blue square",
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Repeatable; default: the workflow's own."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=64, help="Requests in one step. Repeatable; default 1, 2, 4."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each measurement: medians.")] = 5,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Measure a workflow's stages, loads and transfers on this machine, for `simulate`."""
    with reporting(debug):
        from kubediffusion.cli.inputs import Typed
        from kubediffusion.cli.profile import Asked
        from kubediffusion.cli.profile import profile as measure_and_write

        typed = Typed(prompt, settings=settings or ())
        measure_and_write(Asked(file, output, typed, size or (), batch or (1, 2, 4), rounds))


revisions.register(app)
shiva.register(app)
simulate.register(app)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    from kubediffusion.cli.shell import output

    number = version_of("kubediffusion")
    output().print(f'{{"version": "{number}"}}' if as_json else f"kubediffusion {number}")
