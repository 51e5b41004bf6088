# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From `kubectl apply` to a PNG."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.figures import Figures
from tests.e2e.release import EXAMPLE, PROMPT, Release

ROLES = {
    "controlnet.edges",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "transformer",
    "vae",
}


@pytest.fixture(scope="module")
def local_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `kubediffusion run` draws on this machine, with as many threads as the pods have."""
    file = tmp_path_factory.mktemp("local") / "local.png"
    command = [Path(sys.executable).with_name("kubediffusion"), "run", "-f", EXAMPLE]
    options = ["--prompt", PROMPT, "--seed", "7", "-o", file]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return file.read_bytes()


def test_the_example_is_applied_and_draws_what_the_local_runtime_draws(
    release: Release, figures: Figures, local_image: bytes
) -> None:
    begin = time.monotonic()
    release.kubectl("apply", "-f", str(EXAMPLE))
    workflow = release.ready("tiny-sd3")
    figures.add("kubectl apply of the first workflow, until it is Ready", time.monotonic() - begin)
    image = release.draw("tiny-sd3")
    figures.add("kubectl apply of the first workflow, until its image", time.monotonic() - begin)
    assert image == local_image
    assert {each["role"] for each in workflow["status"]["models"]} == ROLES


def test_kubectl_shows_that_all_is_well(release: Release) -> None:
    release.serve_example()
    lines = release.kubectl("get", "dwf").splitlines()
    assert lines[0].split() == ["NAME", "READY", "REASON", "AGE"]
    assert lines[1].split()[:3] == ["tiny-sd3", "6/6", "Ready"]
    models = release.kubectl("get", "dmodel").splitlines()
    assert models[0].split() == ["NAME", "READY", "REPLICAS", "DESIRED", "REASON", "AGE"]
    assert {tuple(line.split()[1:5]) for line in models[1:]} == {("1", "1", "1", "Ready")}
    assert len(models) == 1 + len(ROLES)
    assert "all its models can be used" in release.kubectl("describe", "dwf", "tiny-sd3")


def test_helm_test_draws_an_image(release: Release) -> None:
    release.serve_example()
    assert "a PNG of" in release.helm("test", release.name, "--logs", "--timeout", "3m")
