# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The tests' own control plane does what the other tests of this folder build on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.kube import ROOT, ApiError, AsyncKube, ControlPlane, Kube

LABELS = {"app": "web"}


def deployment(name: str, replicas: int = 2) -> dict:
    container = {"name": "main", "image": "localhost/none:1"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": LABELS},
            "template": {"metadata": {"labels": LABELS}, "spec": {"containers": [container]}},
        },
    }


def config_map(name: str, owner: dict | None = None, **data: str) -> dict:
    meta: dict = {"name": name}
    if owner is not None:
        about = {"apiVersion": owner["apiVersion"], "kind": owner["kind"]}
        uid = {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        meta["ownerReferences"] = [{**about, **uid}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def test_a_deployment_gets_its_pods_and_deleting_it_takes_them(kube: Kube) -> None:
    kube.apply(deployment("web"))
    kube.wait_all("Pod", lambda pods: len(pods) == 2, selector="app=web")
    kube.delete("Deployment", "web")
    kube.wait_all("Pod", lambda pods: not pods, selector="app=web")


def test_what_one_of_our_kinds_owns_is_collected_with_it(kube: Kube) -> None:
    pool = kube.apply(
        {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": "ModelPool",
            "metadata": {"name": "shared"},
            "spec": {},
        }
    )
    kube.create(config_map("owned", pool))
    kube.delete("mpool", "shared")
    kube.wait_gone("ConfigMap", "owned", timeout=25)


def test_applies_are_server_side_with_owners_and_conflicts(kube: Kube) -> None:
    kube.apply(config_map("shared", colour="red"), manager="one")
    with pytest.raises(ApiError) as refused:
        kube.apply(config_map("shared", colour="blue"), manager="two", force=False)
    assert refused.value.status == 409
    assert refused.value.reason == "Conflict"
    assert kube.apply(config_map("shared", colour="blue"), manager="two")["data"] == {
        "colour": "blue"
    }


def test_a_wait_ends_with_the_change_and_tells_what_it_saw_when_it_does_not(kube: Kube) -> None:
    kube.apply(config_map("light", colour="red"))
    turn = {"data": {"colour": "green"}}
    timer = threading.Timer(0.3, kube.patch, ("ConfigMap", "light", turn))
    timer.start()
    seen = kube.wait_for("ConfigMap", "light", lambda it: it["data"]["colour"] == "green")
    assert seen["data"]["colour"] == "green"
    timer.join()
    with pytest.raises(TimeoutError, match='"light"'):
        kube.wait_for("ConfigMap", "light", lambda it: "blue" in it["data"], timeout=0.2)


def test_a_service_account_may_do_what_its_roles_say(
    kube: Kube, namespace: str, token_for: Callable[[str], str]
) -> None:
    reader = kube.acting_as(token_for("reader"))
    with pytest.raises(ApiError) as refused:
        reader.list("ConfigMap")
    assert refused.value.status == 403
    assert f"system:serviceaccount:{namespace}:reader" in refused.value.message
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}
    rbac = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "r"}, "rules": [rule]}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "r"},
        "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "r"},
        "subjects": [{"kind": "ServiceAccount", "name": "reader", "namespace": namespace}],
    }
    kube.apply(role)
    kube.apply(binding)
    # The authorizer learns of it by its own watch.
    for _ in range(100):
        try:
            assert [item["metadata"]["name"] for item in reader.list("ConfigMap")]
            break
        except ApiError:
            kube.wait_for("ConfigMap", "kube-root-ca.crt")


def test_the_api_server_comes_back_with_all_it_had(control_plane: ControlPlane, kube: Kube) -> None:
    kube.apply(config_map("kept", colour="red"))
    waiting: list[dict] = []

    def wait() -> None:
        green = lambda it: it["data"]["colour"] == "green"  # noqa: E731
        waiting.append(kube.wait_for("ConfigMap", "kept", green, timeout=60))

    thread = threading.Thread(target=wait)
    thread.start()
    control_plane.stop_apiserver()
    control_plane.start_apiserver()
    kube.patch("ConfigMap", "kept", {"data": {"colour": "green"}})
    thread.join(60)
    assert [item["data"]["colour"] for item in waiting] == ["green"]


def test_writes_are_counted_by_who_made_them(
    control_plane: ControlPlane, kube: Kube, namespace: str, token_for: Callable[[str], str]
) -> None:
    token = token_for("writer")
    start = control_plane.now()
    with pytest.raises(ApiError):
        kube.acting_as(token).create(config_map("refused"))
    kube.create(config_map("one"))
    kube.list("ConfigMap")
    mine = [
        event
        for event in control_plane.writes(start, agent="tests")
        if event["objectRef"]["namespace"] == namespace
    ]
    assert [(e["verb"], e["responseStatus"]["code"]) for e in mine] == [
        ("create", 403),
        ("create", 201),
    ]
    refused = control_plane.writes(start, user=f"{namespace}:writer")
    assert [event["objectRef"]["resource"] for event in refused] == ["configmaps"]


def test_pods_below_the_restricted_level_are_refused(kube: Kube, namespace: str) -> None:
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    kube.patch("Namespace", namespace, {"metadata": {"labels": level}})
    spec = {"containers": [{"name": "main", "image": "localhost/none:1"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}, "spec": spec}
    with pytest.raises(ApiError, match='violates PodSecurity "restricted'):
        kube.create(pod)


async def test_waits_leave_the_event_loop_free(akube: AsyncKube) -> None:
    waiting = asyncio.create_task(akube.wait_for("ConfigMap", "late"))
    await akube.create(config_map("late"))
    assert (await waiting)["metadata"]["name"] == "late"


def test_kubectl_knows_our_kinds(control_plane: ControlPlane) -> None:
    assert "ModelPool" in control_plane.kubectl("explain", "mpool")
    assert "the server doesn't have" in control_plane.kubectl("get", "nothings", check=False)


def test_nothing_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from tests.cluster.kube import ControlPlane\n"
        "plane = ControlPlane(pathlib.Path(sys.argv[1]), controllers=()); plane.start()\n"
        "names = ('etcd', 'kube-apiserver')\n"
        "print(*(plane.processes.pid(name) for name in names), flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    watched = [os.pidfd_open(int(pid)) for pid in child.stdout.readline().split()]
    assert len(watched) == 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    for descriptor in watched:
        # A pidfd is readable once its process has ended.
        assert _readable(descriptor, 10.0)
        os.close(descriptor)


def _readable(descriptor: int, timeout: float) -> bool:
    import select

    return bool(select.select([descriptor], [], [], timeout)[0])
