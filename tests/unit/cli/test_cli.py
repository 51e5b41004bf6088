# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: help, exit codes, errors in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kubediffusion.cli.app import app

WORKFLOW = """\
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: small}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "file://pipeline"}
  loras:
    - {name: style, source: {uri: "file://style"}}
"""
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workflow whose pipeline has an index and no weights. Nothing is up."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    # None of these tests gets so far as to need a node.
    monkeypatch.setattr("kubediffusion.local.process.warm_up", lambda modules: None)
    monkeypatch.setattr("kubediffusion.cli.up.warm_up", lambda modules: None)
    monkeypatch.setattr("kubediffusion.local.runtime.warm_up", lambda modules: None)
    monkeypatch.setattr("kubediffusion.local.runtime.Supervisor", None)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "style").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(INDEX))
    path = tmp_path / "small.yaml"
    path.write_text(WORKFLOW)
    return path


def test_help_comes_at_once_and_without_torch() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['kubediffusion', 'run', '--help']\n"
        "from kubediffusion.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = {'torch', 'diffusers', 'grpc', 'fastapi', 'huggingface_hub', 'yaml'}\n"
        "    print('imported:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--prompt" in done.stdout
    assert "imported: []" in done.stdout


@pytest.mark.parametrize(
    "module", ["local", "cli.run", "cli.up", "cli.check", "cli.remote", "cli.screens"]
)
def test_no_command_needs_torch_here(module: str) -> None:
    code = (
        f"import sys, kubediffusion.{module}\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'huggingface_hub'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "command", ["run", "up", "generate", "validate", "status", "models", "version"]
)
def test_every_command_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "-f"), ("draw",), ("run", "-f", "x", "-n", "0"), ("up",)]
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_a_valid_workflow_is_shown_with_its_models_and_inputs(file: Path) -> None:
    result = invoke("validate", "-f", file)
    assert result.exit_code == 0
    assert "small is valid" in result.stdout
    assert "SD3Transformer2DModel" in result.stdout
    assert "max_sequence_length" in result.stdout
    assert "\x1b" not in result.stdout


def test_validation_speaks_json_to_programs(file: Path) -> None:
    bad = file.with_name("bad.yaml")
    bad.write_text(WORKFLOW.replace("preset:", "presett:"))
    result = invoke("validate", "-f", file, "-f", bad, "--json")
    assert result.exit_code == 1
    good, wrong = json.loads(result.stdout)
    assert (good["valid"], good["name"]) == (True, "small")
    assert {model["role"] for model in good["models"]} == {
        "text_encoder",
        "text_encoder_2",
        "transformer",
        "vae",
    }
    assert wrong["valid"] is False
    assert wrong["field"] == "spec.pipeline.presett"


def test_offline_validation_leaves_the_sources_alone(file: Path) -> None:
    (file.parent / "pipeline" / "model_index.json").unlink()
    assert invoke("validate", "-f", file).exit_code == 1
    result = invoke("validate", "-f", file, "--offline")
    assert result.exit_code == 0
    assert "sources were not looked into" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "colour=red"), "--set colour: no such input; the workflow has guidance"),
        (("--set", "steps=many"), "--set steps: 'many' is not a whole number"),
        (("--set", "guidance=high"), "--set guidance: 'high' is not a number"),
        (("--set", "prompt"), "--set: 'prompt' is not of the form NAME=VALUE"),
        (("--set", "prompt=@missing.txt"), "--set prompt: there is no file missing.txt"),
        (("--image", "missing.png"), "--image: there is no file missing.png"),
        (("--control", "edges=missing.png"), "--control edges: there is no file missing.png"),
        (("--lora", "style"), "--lora: 'style' is not of the form NAME=SCALE"),
        (("--lora", "style=much"), "--lora style: 'much' is not a number"),
        (("--lora", "other=1"), "loras.other"),
        (("--steps", "0"), "inputs.steps"),
        (("--budget", "0.6"), "budget: workflow small prunes no tokens"),
        (("--replicas", "vae"), "--replicas: 'vae' is not of the form ROLE=N"),
        (
            ("--policy", "fastest"),
            "policy: there is no policy 'fastest' for a gateway; take one of",
        ),
        (("-o", "picture.jpg"), "-o: picture.jpg: pictures are PNG"),
        (("-o", "."), "is a folder"),
        (("-o", "/proc/nowhere/picture.png"), "-o: cannot write /proc/nowhere/picture.png"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(
    file: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = invoke("run", "-f", file, "-p", "a red circle", *arguments)
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_prompt_that_is_missing_is_asked_for(file: Path) -> None:
    result = invoke("run", "-f", file)
    assert result.exit_code == 1
    assert "inputs.prompt" in result.stderr


@pytest.mark.parametrize("command", ["run", "validate", "up"])
def test_a_file_that_is_not_there_is_named(file: Path, command: str) -> None:
    result = invoke(command, "-f", "nothing.yaml")
    assert result.exit_code == 1
    assert "there is no file nothing.yaml" in result.stderr


def test_a_wrong_file_is_shown_with_field_and_line(file: Path) -> None:
    file.write_text(WORKFLOW.replace("StableDiffusion3", "StableDiffusion9"))
    result = invoke("run", "-f", file, "-p", "x")
    assert result.exit_code == 1
    assert "spec.pipeline.preset" in result.stderr
    assert "line 6" in result.stderr


def test_a_program_reads_every_problem_of_a_file_whole(file: Path) -> None:
    """However long its line is: no terminal, no width."""
    file.write_text(WORKFLOW.replace("preset:", "presett:") + "  replicas: 1\n")
    lines = invoke("validate", "-f", file).stderr.splitlines()
    assert len(lines) > 1
    assert all(f"({file}, line " in line and line.endswith(")") for line in lines), lines


@pytest.mark.parametrize("command", ["status", "generate"])
def test_where_nothing_is_up_the_user_learns_how_to_start_it(file: Path, command: str) -> None:
    result = invoke(command)
    assert result.exit_code == 1
    assert "kubediffusion up -f FILE" in result.stderr


def test_a_gateway_that_does_not_answer_is_named(file: Path) -> None:
    result = invoke("status", "--address", f"unix:{file.parent}/nobody.sock")
    assert result.exit_code == 1
    assert "nobody.sock" in result.stderr


def test_debug_shows_where_an_error_came_from(file: Path) -> None:
    result = invoke("run", "-f", "nothing.yaml", "--debug")
    assert result.exception is not None
    assert "nothing.yaml" in str(result.exception)


def test_models_lists_what_is_here(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", os.fspath(file.parent / "cache"))
    result = invoke("models", "--json")
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"builtin", "downloaded", "workflows", "served"}


def test_the_version_is_told() -> None:
    assert invoke("version").stdout.startswith("kubediffusion ")
    assert "version" in json.loads(invoke("version", "--json").stdout)
