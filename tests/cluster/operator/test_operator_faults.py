# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Bad days of the API server, and of the operator's process."""

from __future__ import annotations

import itertools
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kube import ControlPlane, Kube, condition, is_true
from tests.cluster.operator.conftest import NewOperator
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.faults import Call, Expire, Fault, FaultProxy, Lose, Refuse
from tests.cluster.operator.running import OperatorProcess
from tests.cluster.operator.wanted import (
    differences,
    models_of,
    models_of_all,
    pipeline,
    wait_for_models,
    workflow,
)

LONG = 120.0
SEED = 4


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultProxy]:
    with FaultProxy(control_plane) as proxy:
        yield proxy


def bring_back(plane: ControlPlane) -> None:
    """The API server, and controllers that have not learned to wait.

    Theirs double their pauses with each restart, up to a minute: of no interest here.
    """
    plane.start_apiserver()
    plane.stop_controllers()
    plane.start_controllers()


def bad_days(seed: int) -> tuple[random.Random, list[Fault], list[Fault]]:
    """A die, what befalls calls, and what befalls watches."""
    calls: list[Fault] = [
        Refuse(409, "Conflict"),
        Refuse(429, "TooManyRequests", retry_after=1),
        Refuse(500, "InternalError"),
        Refuse(503, "ServiceUnavailable"),
        Refuse(504, "Timeout"),
        Lose(),
    ]
    return random.Random(seed), calls, [Expire(410), Expire(500), Refuse(500), Refuse(410, "Gone")]


def test_errors_lost_answers_and_broken_watches_are_survived(
    new_operator: NewOperator, proxy: FaultProxy, kube: Kube, tmp_path: Path
) -> None:
    die, calls, watches = bad_days(SEED)

    def rule(call: Call) -> Fault | None:
        if call.watch:
            return die.choice(watches) if die.random() < 0.3 else None
        return die.choice(calls) if die.random() < 0.15 else None

    proxy.rule = rule
    operator = new_operator(server=proxy.url)
    operator.start()
    there: dict[str, dict] = {}
    seen: set[str] = set()
    every = {"409", "429", "500", "503", "504", "Lose", "Expire"}
    for number in itertools.count():
        name = f"w{number % 5}"
        if name in there and die.random() < 0.4:
            kube.delete("dwf", name)
            del there[name]
        else:
            there[name] = workflow(name, pipeline(tmp_path / f"p{die.randrange(3)}"))
            kube.apply(there[name])
        if number % 3 == 0:
            proxy.drop_watches()
        seen = {
            str(fault.status) if isinstance(fault, Refuse) else type(fault).__name__
            for _, fault in proxy.injected
        }
        # The die has to have had its say in every way.
        if number >= 11 and every <= seen:
            break
        assert number < 200, f"never injected: {every - seen}"
        time.sleep(0.1)
    wait_for_models(kube, models_of_all(there.values()), timeout=LONG)
    operator.check()
    # And the operator is still itself.
    proxy.rule = lambda call: None
    last = workflow("last", pipeline(tmp_path / "last"))
    kube.apply(last)
    wait_for_models(kube, models_of_all([*there.values(), last]), timeout=LONG)
    assert operator.metric("api_errors_total", code="429") > 0
    assert operator.probe("healthz") == (200, "ok\n")


def test_what_is_deleted_while_no_watch_is_up_is_noticed(
    new_operator: NewOperator, proxy: FaultProxy, kube: Kube
) -> None:
    operator = new_operator(server=proxy.url)
    operator.start()
    definition = workflow("sd3")
    kube.apply(definition)
    models = set(models_of(definition).values())
    wait_for_models(kube, models)

    name = sorted(models)[0]
    gone = {"begun": False}
    expired: set[str] = set()

    def rule(call: Call) -> Fault | None:
        if not call.watch:
            return None
        if not gone["begun"]:
            return Refuse(503)
        if call.path not in expired:
            expired.add(call.path)
            return Expire(410)
        return None

    proxy.rule = rule
    assert proxy.drop_watches() >= 10
    kube.delete("Service", name)
    kube.delete("dwf", "sd3")
    kube.wait_gone("dwf", "sd3")
    gone["begun"] = True
    wait_for_models(kube, set(), timeout=LONG)
    assert expired


def test_a_server_that_refuses_one_object_does_not_hold_up_the_others(
    new_operator: NewOperator, proxy: FaultProxy, kube: Kube, tmp_path: Path
) -> None:
    definition = workflow("sd3")
    refused = models_of(definition)["vae"]

    def rule(call: Call) -> Fault | None:
        if call.write and call.path.endswith(f"/deployments/{refused}"):
            return Refuse(422, "Invalid")
        return None

    proxy.rule = rule
    operator = new_operator(server=proxy.url)
    operator.start()
    kube.apply(definition)
    models = set(models_of(definition).values())
    kube.wait_all("Deployment", lambda found: len(found) == len(models) - 1, timeout=LONG)

    told = kube.wait_for(
        "dwf", "sd3", lambda w: condition(w, "Degraded").get("status") == "True", timeout=LONG
    )
    assert condition(told, "Degraded")["reason"] == "Refused"
    assert "injected by the test" in condition(told, "Degraded")["message"]
    tries = sum(fault == Refuse(422, "Invalid") for _, fault in proxy.injected)
    assert tries < 5
    assert not [line for line in differences(kube, models) if refused not in line]
    # Once it is taken, by a rest later, all is there.
    proxy.rule = lambda call: None
    wait_for_models(kube, models, timeout=LONG)
    kube.wait_for("dwf", "sd3", lambda w: condition(w, "Degraded").get("status") != "True")


def test_the_api_server_may_go_away_and_come_back(
    control_plane: ControlPlane,
    operator: OperatorProcess,
    kube: Kube,
    kubelet: FakeKubelet,
    tmp_path: Path,
) -> None:
    kube.apply(workflow("before", pipeline(tmp_path / "a")))
    kube.wait_for("dwf", "before", is_true("Ready"), timeout=LONG)
    control_plane.stop_apiserver()
    try:
        time.sleep(3)  # watches break, connections are refused
        operator.check()
        assert operator.probe("healthz")[0] == 200
    finally:
        bring_back(control_plane)
    kube.delete("dwf", "before")
    after = workflow("after", pipeline(tmp_path / "b"))
    kube.apply(after)
    wait_for_models(kube, models_of_all([after]), timeout=LONG)
    kube.wait_for("dwf", "after", is_true("Ready"), timeout=LONG)
    assert operator.starts == 1
    operator.check()


def test_an_operator_that_starts_before_the_api_server_waits_for_it(
    control_plane: ControlPlane, new_operator: NewOperator, kube: Kube
) -> None:
    definition = workflow("sd3")
    kube.apply(definition)
    operator = new_operator()
    control_plane.stop_apiserver()
    try:
        operator.start()
        end = time.monotonic() + LONG
        while not operator.announced and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(2)
        assert operator.probe("readyz")[0] == 503
        assert operator.probe("healthz")[0] == 200
    finally:
        bring_back(control_plane)
    operator.wait_ready()
    wait_for_models(kube, set(models_of(definition).values()), timeout=LONG)


def test_it_ends_at_once_and_in_order_when_it_is_told_to(operator: OperatorProcess) -> None:
    begin = time.monotonic()
    assert operator.terminate() == 0
    assert time.monotonic() - begin < 20
    assert "Traceback" not in operator.log(200)


def test_a_port_in_use_ends_it_with_a_message(control_plane: ControlPlane, tmp_path: Path) -> None:
    config = tmp_path / "operator.yaml"
    config.write_text("image: example/node:1\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [sys.executable, "-m", "kubediffusion_operator", "--config", config]
        words += ["--kubeconfig", control_plane.kubeconfig(), "--host", "127.0.0.1"]
        words += ["--health-port", port, "--metrics-port", "0"]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 1
    assert f"cannot serve health on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
