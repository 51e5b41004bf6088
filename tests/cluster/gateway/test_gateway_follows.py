# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway process that follows a real API server, over real node processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from conftest import StartGateway, StartNode
from follow_rig import GatewayPod, Revised, publish_slice, until

from kubediffusion.client import Client, Finished, Image, Stepped
from kubediffusion.errors import NotFound, Unavailable
from tests.cluster.kube import ControlPlane, Kube

ONE, TWO = Revised("sd3", "file:///models/one"), Revised("sd3", "file:///models/two")


def names(client: Client) -> list[str]:
    return [workflow.name for workflow in client.workflows()]


def nodes_of(client: Client, **options: Any) -> set[str]:
    """Draws a picture; the nodes that worked on it."""
    *_, last = client.generate("sd3", prompt="a fox", steps=4, **options)
    assert isinstance(last, Finished)
    return {stage.node for stage in last.stages}


class Load:
    """Clients that draw one picture after the other; every failure is kept."""

    def __init__(self, address: str, clients: int = 4, attempts: int = 1) -> None:
        self.nodes: Counter[str] = Counter()
        self.failures: list[Exception] = []
        self.done = 0
        self._address, self._attempts = address, attempts
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._draw) for _ in range(clients)]

    def _draw(self) -> None:
        with Client(self._address, attempts=self._attempts) as client:
            while not self._stop.is_set():
                try:
                    self.nodes.update(nodes_of(client, deadline=60.0))
                    self.done += 1
                except Exception as error:
                    self.failures.append(error)
                    return

    def more(self, count: int = 8) -> None:
        """Blocking, until so many more pictures are there."""
        wanted = self.done + count
        until(lambda: self.done >= wanted or self.failures, f"{count} more pictures")
        assert not self.failures, self.failures

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()


@contextmanager
def load_on(address: str, **options: Any) -> Iterator[Load]:
    load = Load(address, **options)
    load.start()
    try:
        load.more()
        yield load
        load.more()
    finally:
        load.end()
    assert not load.failures, load.failures


# ---------------------------------------------------------------- following


def test_a_workflow_is_served_on_the_nodes_that_its_slices_name(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    pod = gateway().ready()  # with nothing to serve: a release without workflows is no failure
    ONE.publish(kube)
    publish_slice(kube, "sd3", [node("n1", ONE.resolved)])
    with Client(pod.grpc) as client:
        until(lambda: names(client) == ["sd3"], "the workflow is known")
        image = client.image("sd3", prompt="a fox", seed=7, steps=4)
        assert image.pil().size == (8, 8)
        body = {"model": "sd3", "prompt": "a fox", "seed": 7, "steps": 4}
        answer = httpx.post(
            f"{pod.http}/v1/images/generations", json=body, trust_env=False, timeout=60
        )
        assert answer.status_code == 200, answer.text
        kube.delete("DiffusionWorkflow", "sd3")
        until(lambda: names(client) == [], "the workflow is gone")
        with pytest.raises(NotFound):
            client.image("sd3", prompt="a fox")
    pod.terminate()
    assert pod.exit_code() == 0


def test_a_revision_that_cannot_be_read_stops_nobody_else(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    bad, good = Revised("bad", "file:///models/one"), Revised("good", "file:///models/one")
    kube.apply(bad.body)
    bad.keep(kube, 1, data={"format": 99, "from": "the future"})
    bad.serve(kube)
    good.publish(kube)
    pod = gateway().ready()
    with Client(pod.grpc) as client:
        assert names(client) == ["good"]
        # And what was served goes on where the next revision is of that kind.
        worse = Revised("good", "file:///models/two")
        worse.keep(kube, 2, data={"format": 99})
        worse.serve(kube)
        until(lambda: "serving good-" in pod.log.read_text(), "the warning")
        assert names(client) == ["good"]


def test_what_a_gateway_may_not_see_keeps_it_from_being_ready_and_alive(
    kube: Kube, gateway: StartGateway, token_for: Callable[[str], str]
) -> None:
    ONE.publish(kube)
    pod = gateway(token=token_for("gateway"))
    assert pod.get("/healthz").status_code == 200
    until(lambda: "is forbidden" in pod.log.read_text(), "the reason in the log")
    refused = pod.get("/readyz")
    assert refused.status_code == 503
    assert "not known yet" in refused.text
    with Client(pod.grpc, attempts=1) as client, pytest.raises(Unavailable):
        client.image("sd3", prompt="a fox")
    rules = [
        {"apiGroups": [group], "resources": [resource], "verbs": ["list", "watch"]}
        for group, resource in (
            ("kubediffusion.io", "diffusionworkflows"),
            ("apps", "controllerrevisions"),
            ("discovery.k8s.io", "endpointslices"),
        )
    ]
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "gateway"}}
    kube.apply({**rbac, "kind": "Role", "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "gateway", "namespace": kube.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "gateway"}
    kube.apply({**rbac, "kind": "RoleBinding", "subjects": [subject], "roleRef": role})
    pod.ready()
    assert [each["id"] for each in pod.get("/v1/models").json()["data"]] == ["sd3"]


# ---------------------------------------------------------------- change under load


def test_traffic_moves_to_the_next_revision_and_no_request_fails(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    old, new = node("old", ONE.resolved), node("new", TWO.resolved)
    ONE.publish(kube)
    publish_slice(kube, "old", [old.ready()])
    pod = gateway().ready()
    with load_on(pod.grpc) as load:
        assert set(load.nodes) == {"old"}
        # The next revision's models are Ready long before it is served.
        publish_slice(kube, "new", [new.ready()])
        TWO.keep(kube, 2)
        kube.apply(Revised("other", "file:///models/one").body)
        load.more()
        assert set(load.nodes) == {"old"}
        TWO.serve(kube)
        until(lambda: load.nodes["new"], "the next revision serves")
        load.nodes.clear()
        load.more(12)
        assert load.nodes["old"] < load.nodes["new"]
        # The old one goes: its pods terminate.
        publish_slice(kube, "old", [old], terminating=[old])
        old.terminate()
        load.more()
    assert old.exit_code() == 0


def test_a_terminating_node_gives_up_its_work_and_no_request_fails(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    first, second = (node(name, ONE.resolved, step_seconds=0.05) for name in ("n1", "n2"))
    ONE.publish(kube)
    publish_slice(kube, "sd3", [first.ready(), second.ready()])
    pod = gateway().ready()
    with load_on(pod.grpc) as load:
        until(lambda: load.nodes["n1"] and load.nodes["n2"], "both nodes work")
        publish_slice(kube, "sd3", [first, second], terminating=[first])
        first.terminate()
        assert first.exit_code() == 0
        load.more()
        load.nodes.clear()
        load.more()
        assert set(load.nodes) == {"n2"}


def test_a_node_that_is_not_ready_yet_is_dialled(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    """A request that waits for it is served the moment its models are there."""
    pod = gateway().ready()
    ONE.publish(kube)
    with Client(pod.grpc) as client:
        until(lambda: names(client) == ["sd3"], "the workflow is known")
        events = client.generate("sd3", prompt="a fox", steps=4)
        assert next(events).cold  # type: ignore[attr-defined]
        publish_slice(kube, "sd3", [node("n1", ONE.resolved)])
        assert isinstance([*events][-1], Finished)


# ---------------------------------------------------------------- an API server that comes and goes


def test_nothing_is_forgotten_while_the_api_server_is_away(
    control_plane: ControlPlane, kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    ONE.publish(kube)
    other = Revised("other", "file:///models/one")
    other.publish(kube)
    publish_slice(kube, "sd3", [node("n1", ONE.resolved).ready()])
    pod = gateway().ready()
    with load_on(pod.grpc) as load:
        control_plane.stop_apiserver()
        try:
            until(lambda: "keeping what is known" in pod.log.read_text(), "it has noticed")
            load.more()
            assert pod.is_ready
        finally:
            control_plane.start_apiserver()
        # What happens from now on is followed again, what was deleted unseen too.
        Revised("new", "file:///models/one").publish(kube)
        kube.delete("DiffusionWorkflow", "other")
        with Client(pod.grpc) as client:
            until(lambda: names(client) == ["new", "sd3"], "it follows again")


def test_what_was_deleted_while_a_gateway_slept_is_gone_when_it_wakes(
    control_plane: ControlPlane, kube: Kube, gateway: StartGateway
) -> None:
    """Its watches are broken, and the versions that they stopped at are forgotten over there."""
    ONE.publish(kube)
    Revised("doomed", "file:///models/one").publish(kube)
    pod = gateway().ready()
    with Client(pod.grpc) as client:
        assert names(client) == ["doomed", "sd3"]
        os.kill(pod.process.pid, signal.SIGSTOP)
        try:
            kube.delete("DiffusionWorkflow", "doomed")
            control_plane.stop_apiserver()
            control_plane.start_apiserver()
        finally:
            os.kill(pod.process.pid, signal.SIGCONT)
        until(lambda: names(client) == ["sd3"], "the deleted workflow is gone")


def test_a_gateway_can_start_while_the_api_server_is_away(
    control_plane: ControlPlane, kube: Kube, gateway: StartGateway
) -> None:
    ONE.publish(kube)
    control_plane.stop_apiserver()
    try:
        pod: GatewayPod = gateway()
        assert pod.get("/healthz").status_code == 200
        assert not pod.is_ready
    finally:
        control_plane.start_apiserver()
    pod.ready()
    with Client(pod.grpc) as client:
        assert names(client) == ["sd3"]


def test_a_request_that_waits_fails_at_once_when_its_workflow_is_deleted(
    kube: Kube, gateway: StartGateway
) -> None:
    pod = gateway().ready()
    ONE.publish(kube)  # without nodes
    failures: list[Exception] = []

    def draw() -> None:
        with Client(pod.grpc, attempts=1) as asking:
            try:
                asking.image("sd3", prompt="a fox", steps=4)
            except Exception as error:
                failures.append(error)

    with Client(pod.grpc) as client:
        until(lambda: names(client) == ["sd3"], "the workflow is known")
        asking = threading.Thread(target=draw)
        asking.start()
        until(lambda: client.status().held, "the request is held")
        kube.delete("DiffusionWorkflow", "sd3")
        asking.join(60)  # and not after the activation timeout of 300 s
        assert not asking.is_alive()
    (error,) = failures
    assert isinstance(error, NotFound)
    assert "was deleted" in str(error)
    pod.terminate()


class Asking:
    """A client with one request, in a thread of its own; `steps` counts what it has heard."""

    def __init__(self, address: str, **inputs: Any) -> None:
        self.steps, self.pictures = 0, 0
        self.error: Exception | None = None
        self._address, self._inputs = address, inputs
        self._thread = threading.Thread(target=self._draw)
        self._thread.start()

    def _draw(self) -> None:
        with Client(self._address, attempts=1) as client:
            try:
                for event in client.generate("sd3", prompt="a fox", **self._inputs):
                    self.steps += isinstance(event, Stepped)
                    self.pictures += isinstance(event, Image)
            except Exception as error:
                self.error = error

    def end(self) -> Asking:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self


def test_nodes_hear_what_requests_of_the_revision_before_will_come_for(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    """Those of the last stage have no task of it yet."""
    old = node("old", ONE.resolved, step_seconds=0.1)
    ONE.publish(kube)
    publish_slice(kube, "sd3", [old.ready()])
    door = gateway().ready().grpc
    with Client(door) as client:
        until(lambda: all(each.ready for each in client.workflows()), "its models are known")
    asking = Asking(door, steps=30)
    until(lambda: asking.steps, "it draws")
    assert old.needed() == set()
    TWO.keep(kube, 2)
    TWO.serve(kube)
    everything = {ref.identity for ref in ONE.resolved.models.values()}
    until(lambda: old.needed() == everything, "the node knows")
    assert not asking.pictures
    assert asking.end().pictures == 1
    until(lambda: not old.needed(), "it knows that it has ended")


def test_what_draws_ends_though_its_workflow_is_deleted_and_its_nodes_go(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    """As the garbage collector has it: the workflow first, and a little later all pods at once. The
    one for the last stage has had nothing to do yet."""
    models = ONE.resolved.models
    drawing = {role: ref for role, ref in models.items() if role == "transformer"}
    rest = {role: ref for role, ref in models.items() if role != "transformer"}
    pods = [
        node("dit", replace(ONE.resolved, models=drawing), step_seconds=0.1),
        node("rest", replace(ONE.resolved, models=rest)),
    ]
    ONE.publish(kube)
    publish_slice(kube, "sd3", [pod.ready() for pod in pods])
    door = gateway().ready().grpc
    with Client(door) as client:
        until(lambda: all(each.ready for each in client.workflows()), "its models are known")
        # Long enough for all that follows: else the second one's turn would come.
        first = Asking(door, steps=60)
        until(lambda: first.steps, "it draws")
        second = Asking(door, steps=60)
        # Behind the first one: who is still at its encoder waits for nothing, and may end too.
        until(lambda: (1, 1) in [(n.queued, n.running) for n in client.status().nodes], "one waits")
        kube.delete("DiffusionWorkflow", "sd3")
        until(lambda: names(client) == [], "the gateway has heard of it")
        publish_slice(kube, "sd3", pods, terminating=pods)
        for pod in pods:
            pod.terminate()
        assert "was deleted" in str(second.end().error)
        assert isinstance(second.error, NotFound)
        assert first.end().error is None
        assert first.pictures == 1
        with pytest.raises(NotFound, match="there is no workflow"):
            client.image("sd3", prompt="a fox")
    assert [pod.exit_code() for pod in pods] == [0, 0]


def test_a_revision_of_a_newer_version_leaves_what_is_served(
    kube: Kube, node: StartNode, gateway: StartGateway
) -> None:
    ONE.publish(kube)
    publish_slice(kube, "sd3", [node("n1", ONE.resolved)])
    newer = Revised("sd3", "file:///models/two")
    spec = {**newer.data["workflow"]["spec"], "guidanceSchedule": "cosine"}
    data = {**newer.data, "workflow": {**newer.data["workflow"], "spec": spec}}
    pod = gateway().ready()
    with Client(pod.grpc) as client:
        until(lambda: names(client) == ["sd3"], "the workflow is known")
        newer.keep(kube, 2, data)
        newer.serve(kube)
        until(lambda: "guidanceSchedule" in pod.log.read_text(), "the log says why")
        assert "upgrade this one" in pod.log.read_text()
        assert nodes_of(client) == {"n1"}
    pod.terminate()
