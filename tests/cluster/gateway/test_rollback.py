# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion history` and `rollback` against a real API server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from follow_rig import INDEX, Revised

from kubediffusion.workflow import PipelineIndex
from tests.cluster.kube import ControlPlane, Kube

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(control_plane: ControlPlane, kube: Kube) -> Run:
    """The real program, in the test's namespace."""

    def run(*words: object, program: str = "kubediffusion", **environ: str) -> Any:
        command = [Path(".venv/bin") / program, *map(str, words)]
        kubeconfig = str(control_plane.kubeconfig(namespace=kube.namespace))
        environ = {**control_plane.environment(), "KUBECONFIG": kubeconfig, **environ}
        return subprocess.run(command, env=environ, capture_output=True, text=True)

    return run


def revised(uri: str, commit: str = "") -> Revised:
    return Revised("sd3", uri, PipelineIndex(INDEX.components, commit))


FIRST = revised("hf://acme/sd3", commit="a" * 40)
SECOND = revised("hf://acme/sd3-tuned", commit="b" * 40)


@pytest.fixture
def two_revisions(kube: Kube) -> None:
    FIRST.publish(kube, 1)
    SECOND.publish(kube, 2)


def test_history_tells_the_revisions_and_what_changed(run: Run, two_revisions: None) -> None:
    done = run("history", "sd3")
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stdout.splitlines() if "sd3-" in line)
    assert first.split()[:2] == ["1", FIRST.revision]
    assert second.split()[:3] == ["2", SECOND.revision, "served"]
    assert "pipeline.source.uri" in second
    rows = json.loads(run("history", "sd3", "--json").stdout)
    assert [row["revision"] for row in rows] == [1, 2]
    assert [row["commit"] for row in rows] == ["a" * 40, "b" * 40]
    assert [row["served"] for row in rows] == [False, True]


def test_rollback_writes_the_older_spec_with_its_commits(
    run: Run, kube: Kube, two_revisions: None
) -> None:
    done = run("rollback", "sd3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"sd3 rolled back to revision 1 ({FIRST.revision})"
    source = kube.get("DiffusionWorkflow", "sd3")["spec"]["pipeline"]["source"]
    assert source == {"uri": "hf://acme/sd3", "revision": "a" * 40}
    again = run("rollback", "sd3", "--to", 1, "--json")
    assert json.loads(again.stdout) == {"number": 1, "name": FIRST.revision, "changed": False}


def test_rollback_to_a_number_works_as_a_kubectl_plugin_too(
    run: Run, kube: Kube, two_revisions: None
) -> None:
    done = run("rollback", "sd3", "--to", 2, program="kubectl-diffusion")
    assert done.returncode == 0, done.stderr
    source = kube.get("DiffusionWorkflow", "sd3")["spec"]["pipeline"]["source"]
    assert source["revision"] == "b" * 40


def test_what_only_bears_the_workflows_name_is_no_revision_of_it(
    run: Run, kube: Kube, two_revisions: None
) -> None:
    stray = kube.get("ControllerRevision", FIRST.revision)
    stray["metadata"] = {"name": "sd3-stray", "labels": stray["metadata"]["labels"]}
    kube.create({**stray, "revision": 9})
    rows = json.loads(run("history", "sd3", "--json").stdout)
    assert [row["revision"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollback", "sd3", "--to", 9), "--to: there is no revision 9; kept are: 1, 2"),
        (("rollback", "nope"), "there is no DiffusionWorkflow 'nope' in namespace "),
        (("history", "sd3", "-n", "elsewhere"), "in namespace elsewhere"),
        (("history", "sd3", "--context", "nope"), "no way to the cluster: "),
        (("history", "sd3", "--kubeconfig", "/nonexistent"), "there is no /nonexistent"),
        (("history", "../../../pods"), "there is no DiffusionWorkflow"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(
    run: Run, two_revisions: None, words: tuple[object, ...], message: str
) -> None:
    done = run(*words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_somebody_without_rights_is_told_which(
    run: Run,
    control_plane: ControlPlane,
    kube: Kube,
    two_revisions: None,
    token_for: Callable[[str], str],
) -> None:
    kubeconfig = control_plane.kubeconfig(token_for("nobody"), kube.namespace)
    done = run("rollback", "sd3", KUBECONFIG=str(kubeconfig))
    assert done.returncode == 1
    assert 'cannot get resource "diffusionworkflows"' in done.stderr


def test_an_api_server_that_is_away_is_told(run: Run, kube: Kube, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
        "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n"
        "users: [{name: u, user: {}}]\n"
        "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
    )
    done = run("history", "sd3", KUBECONFIG=str(config))
    assert done.returncode == 1
    assert "http://127.0.0.1:1" in done.stderr
