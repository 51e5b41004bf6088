# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From `kubectl apply` to a PNG."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

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


def drawn_here(folder: Path, *options: str | Path) -> bytes:
    """What `kubediffusion run` draws on this machine, with as many threads as the pods have."""
    file = folder / "local.png"
    command = [Path(sys.executable).with_name("kubediffusion"), "run", "-f", EXAMPLE]
    done = subprocess.run(
        [*command, "--prompt", PROMPT, "--seed", "7", "-o", file, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return file.read_bytes()


@pytest.fixture(scope="module")
def local_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return drawn_here(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def edges() -> bytes:
    """A control picture: the outlines of a circle above a square, as a PNG."""
    picture = Image.new("RGB", (128, 128))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 12, 88, 60), outline="white", width=2)
    draw.rectangle((40, 72, 88, 120), outline="white", width=2)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


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


def test_a_controlnet_helps_on_its_transformers_node(
    release: Release, local_image: bytes, edges: bytes, tmp_path: Path
) -> None:
    release.serve_example()
    file = tmp_path / "edges.png"
    file.write_bytes(edges)
    expected = drawn_here(tmp_path, "--control", f"edges={file}")
    image = base64.b64encode(edges).decode()
    assert release.draw("tiny-sd3", control={"edges": {"image": image}}) == expected
    assert expected != local_image
    models = release.models("tiny-sd3")
    helper, host = models["controlnet.edges"], models["transformer"]
    assert release.kube.get("DiffusionModel", helper)["status"]["hostedBy"] == [host]
    assert len(release.model_pods(host)) == 1
    assert not release.model_pods(helper)


def test_helm_test_draws_an_image(release: Release) -> None:
    release.serve_example()
    assert "a PNG of" in release.helm("test", release.name, "--logs", "--timeout", "3m")
