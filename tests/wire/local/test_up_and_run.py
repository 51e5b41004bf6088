# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The commands whole: a file in, a picture out, with real node processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kubediffusion.local.folders import RunState, running

WAIT = 280.0
WORKFLOW = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: small}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "file://pipeline"}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))
    from small_pipelines import make_sd3

    folder = tmp_path_factory.mktemp("small")
    make_sd3(folder / "pipeline", t5=False)
    path = folder / "small.yaml"
    path.write_text(WORKFLOW)
    return path


@pytest.fixture(scope="module")
def up(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """`kubediffusion up` on free ports, ready; ended by Ctrl-C at the end, with nothing left."""
    base = tmp_path_factory.mktemp("kd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(base))
        command = [sys.executable, "-m", "kubediffusion.cli", "up", "-f", str(file)]
        ports = ["--http=127.0.0.1:0", "--grpc=127.0.0.1:0", "--metrics=127.0.0.1:0"]
        process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line == "ready\n":
                    break
            assert lines[-1] == "ready\n", "".join(lines)
            assert "\x1b" not in "".join(lines)
            yield process
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT) == 0
            last = process.stdout.read().split()
            assert "stopping" in last
            assert last[-1] == "stopped"
            assert os.listdir(base / f"kubediffusion-{os.getuid()}") == []
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kubediffusion.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)


def state() -> RunState:
    (found,) = running()
    return found


def test_generate_finds_what_is_up_and_says_where_the_picture_is(
    up: subprocess.Popen[str], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "folder" / "a.png"
    done = cli("generate", "-p", "a red circle", "--seed", 7, "--set", "steps=4", "-o", target)
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "denoised 4 steps" in done.stderr
    assert "transfer" in done.stderr
    assert "\x1b" not in done.stderr
    again = cli("generate", "-p", "a red circle", "--seed", 7, "--steps", 4, "-n", 2, "--json",
                "-o", tmp_path / "b.png")  # fmt: skip
    pictures = json.loads(again.stdout)["pictures"]
    assert [picture["seed"] for picture in pictures] == [7, 8]
    assert Path(pictures[0]["path"]).read_bytes() == target.read_bytes()
    assert os.listdir(tmp_path / "new" / "folder") == ["a.png"]


def test_a_request_that_the_gateway_refuses_ends_with_its_words(
    up: subprocess.Popen[str], tmp_path: Path
) -> None:
    done = cli("generate", "-p", "x", "--set", "width=33", "-o", tmp_path / "a.png")
    assert done.returncode == 1
    assert "error: inputs.width: 33 is not a multiple of 4" in done.stderr
    assert not list(tmp_path.iterdir())


def test_status_and_models_tell_programs_what_runs(up: subprocess.Popen[str]) -> None:
    status = json.loads(cli("status", "--json").stdout)
    assert {node["id"] for node in status["nodes"]} == {"text", "denoiser", "image"}
    assert [(w["name"], w["ready"]) for w in status["workflows"]] == [("small", True)]
    models = json.loads(cli("models", "--json").stdout)
    assert {model["state"] for model in models["served"]} == {"ready"}
    shown = cli("status")
    assert "denoiser" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_a_second_up_on_the_same_port_says_so(up: subprocess.Popen[str], file: Path) -> None:
    taken = state().grpc
    done = cli("up", "-f", file, "--grpc", taken, "--http", "off", "--metrics", "off")
    assert done.returncode == 1
    assert f"error: cannot listen on {taken}" in done.stderr
    assert state().grpc == taken


def test_metrics_of_the_gateway_and_of_every_node_are_served(up: subprocess.Popen[str]) -> None:
    metrics = httpx.get(f"http://{state().metrics}/metrics").text
    assert "kubediffusion_supervisor_nodes 3.0" in metrics
    base = Path(os.environ["XDG_RUNTIME_DIR"])
    (file,) = base.glob("*/run-*/prometheus.json")
    for target in json.loads(file.read_text()):
        text = httpx.get(f"http://{target['targets'][0]}/metrics").text
        assert "kubediffusion_node_model_state" in text


def test_a_killed_node_is_back_and_status_says_ready(up: subprocess.Popen[str]) -> None:
    base = Path(os.environ["XDG_RUNTIME_DIR"])
    (file,) = base.glob("*/run-*/denoiser.json")
    pid = json.loads(file.read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    ends = time.monotonic() + WAIT
    while _pid(file) in (pid, None):
        assert time.monotonic() < ends
        time.sleep(0.02)
    metrics = httpx.get(f"http://{state().metrics}/metrics").text
    assert 'kubediffusion_supervisor_restarts_total{reason="killed"} 1.0' in metrics


def _pid(announcement: Path) -> int | None:
    try:
        return json.loads(announcement.read_text())["pid"]
    except FileNotFoundError:
        return None


def test_a_profile_of_live_nodes_is_what_the_simulator_reads(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    done = cli("profile", "-f", file, "-o", out, "--rounds", 1, "--batch", 2, "--set", "guidance=4")
    assert done.returncode == 0, done.stderr
    models = json.loads((out / "model_profiles.json").read_text())["models"]
    by_role = {each["role"]: each for each in models.values()}
    assert [run["batch"] for run in by_role["transformer"]["execution"]] == [2, 4]
    assert all(run["seconds"] >= 0 for run in by_role["vae"]["execution"])
    assert by_role["text_encoder"]["load"]["gpu_bytes"] > 0
    transfers = json.loads((out / "transfer_profiles.json").read_text())
    assert [row[0] for row in transfers["same_host"]] == [row[0] for row in transfers["cross_host"]]
    simulated = cli(
        *("simulate", "--profiles", out, "--setting", out / "setting.yaml"),
        *("--trace", out / "trace.txt", "--rate", 0.5, "--json", tmp_path / "result.json"),
    )
    assert simulated.returncode == 0, simulated.stderr
    assert json.loads((tmp_path / "result.json").read_text())["attainment"] > 0
