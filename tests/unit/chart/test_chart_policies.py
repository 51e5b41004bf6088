# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who can talk to whom, by all NetworkPolicies together: exactly the table of docs/kubernetes.md.

A small evaluator of NetworkPolicies stands in for a network plugin: the tests' machines have none
that enforces them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning.children import Nodes, children
from kubediffusion_operator.planning.names import model_labels
from tests.unit.chart.conftest import Render
from tests.unit.chart.rendering import ROOT, Object, Rendered

PORTS = (53, 443, 5432, 6443, 7070, 8080, 8081, 9090, 50051)
NAMESPACE_NAME = "kubernetes.io/metadata.name"
HERE = "pictures"


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or an address outside of the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    namespace: str = HERE
    address: str = ""


def selected(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector takes these labels; one that is left out takes none."""
    if selector is None:
        return False
    equal = selector.get("matchLabels", {}).items() <= labels.items()
    return equal and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", ())
    )


@dataclass(frozen=True)
class Network:
    """NetworkPolicies, each in its namespace."""

    policies: Sequence[tuple[str, Object]]

    def connects(self, source: End, target: End, port: int) -> bool:
        """Whether both ends' policies let a connection through."""
        return self._lets("Egress", source, target, port) and self._lets(
            "Ingress", target, source, port
        )

    def _lets(self, direction: str, pod: End, other: End, port: int) -> bool:
        if pod.address:
            return True
        mine = [
            spec
            for namespace, spec in self.policies
            if namespace == pod.namespace
            and selected(spec["podSelector"], pod.labels)
            and direction in spec["policyTypes"]
        ]
        peers = {"Egress": "to", "Ingress": "from"}[direction]
        return not mine or any(
            self._rule_lets(rule, rule.get(peers), pod, other, port)
            for spec in mine
            for rule in spec.get(direction.lower(), ())
        )

    @staticmethod
    def _rule_lets(
        rule: Object, peers: Sequence[Object] | None, pod: End, other: End, port: int
    ) -> bool:
        if "ports" in rule and port not in {one["port"] for one in rule["ports"]}:
            return False
        return peers is None or any(_is_peer(peer, pod, other) for peer in peers)


def _is_peer(peer: Object, pod: End, other: End) -> bool:
    if "ipBlock" in peer:
        block = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return bool(other.address) and ipaddress.ip_address(other.address) in block
    if other.address:
        return False
    if "namespaceSelector" in peer:
        if not selected(peer["namespaceSelector"], {NAMESPACE_NAME: other.namespace}):
            return False
    elif other.namespace != pod.namespace:
        return False
    return "podSelector" not in peer or selected(peer["podSelector"], other.labels)


def network(rendered: Rendered, config: OperatorConfig, *, downloads: bool = True) -> Network:
    """The policies of the chart and, in its namespace, of one model of the operator's."""
    owner = {"kind": "DiffusionModel", "metadata": {"name": "dit", "uid": "u"}, "spec": {}}
    nodes = Nodes(owner, "dit", model_labels("dit"), 1, 1, downloads=downloads, content={})
    (policy,) = [each for each in children(nodes, config) if each["kind"] == "NetworkPolicy"]
    policies = [
        (each["metadata"]["namespace"], each["spec"]) for each in rendered.of("NetworkPolicy")
    ]
    return Network([*policies, (HERE, policy["spec"])])


def ends(rendered: Rendered) -> dict[str, End]:
    """By the words of the table; and some who have no business with us."""
    of = {meta["labels"]["app.kubernetes.io/component"]: meta for _, meta, _ in rendered.pods()}
    pods = {
        "gateway": of["gateway"]["labels"],
        "operator": of["operator"]["labels"],
        "Prometheus": of["prometheus"]["labels"],
        "helm test": of["test"]["labels"],
        "model nodes": model_labels("dit"),
    }
    return {name: End(labels) for name, labels in pods.items()} | {
        "anyone": End({"app": "client"}, "clients"),
        "a neighbour": End({"app": "neighbour"}),
        "Grafana": End({"app.kubernetes.io/name": "grafana"}, "monitoring"),
        "another Prometheus": End({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
        "another namespace's nodes": End(model_labels("dit"), "other"),
        "DNS": End({"k8s-app": "kube-dns"}, "kube-system"),
        "API server": End(address="10.0.0.1"),
        "internet": End(address="203.0.113.7"),
    }


OURS = ("gateway", "operator", "Prometheus", "helm test", "model nodes")
NARROW = {"networkPolicy": {"apiServer": {"cidr": "10.0.0.1/32"}}}

Edge = tuple[str, str, int]


def documented() -> set[Edge]:
    page = (ROOT / "docs/kubernetes.md").read_text()
    table = page.partition("### Who may talk to whom")[2].partition("###")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([\d, ]+) \|", table, flags=re.MULTILINE)
    return {
        (source, target, int(port))
        for sources, targets, ports in rows
        for source in _words(sources)
        for target in _words(targets)
        for port in ports.split(", ")
    }


def _words(cell: str) -> list[str]:
    return re.sub(r"\s*\(.*?\)", "", cell).split(", ")


def edges(net: Network, there: Mapping[str, End]) -> Iterator[Edge]:
    """All connections that one of ours may make or take."""
    for source, one in there.items():
        for target, other in there.items():
            if source in OURS or target in OURS:
                yield from (
                    (source, target, port) for port in PORTS if net.connects(one, other, port)
                )


def test_the_documented_edges_and_no_others_are_open(render: Render) -> None:
    rendered = render(NARROW)
    there = ends(rendered)
    wanted = documented()
    # Anyone is everyone, but for those of ours: what they send is in the table by name.
    for source, target, port in list(wanted):
        if source == "anyone":
            wanted |= {(other, target, port) for other in there if other not in OURS}
        if target == "internet":
            wanted.add((source, "API server", port))
    assert set(edges(network(rendered, rendered.config), there)) == wanted


@pytest.mark.parametrize("component", OURS)
def test_without_policies_everything_is_open(render: Render, component: str) -> None:
    """The evaluator can say yes."""
    rendered = render({"networkPolicy": {"enabled": False}})
    assert not rendered.config.network_policies.enabled
    net = Network([])
    there = ends(rendered)
    assert all(net.connects(there["a neighbour"], there[component], port) for port in PORTS)


def test_nodes_of_a_model_without_downloads_have_no_way_out(render: Render) -> None:
    rendered = render(NARROW)
    net, there = network(rendered, rendered.config, downloads=False), ends(rendered)
    assert not net.connects(there["model nodes"], there["internet"], 443)


def test_a_node_without_a_policy_of_its_own_ends_requests_and_nothing_more(
    plain: Rendered,
) -> None:
    """Its policy goes with its model, before its pods have ended."""
    there = ends(plain)
    chart = Network([(HERE, each["spec"]) for each in plain.of("NetworkPolicy")])
    touching = {edge for edge in edges(chart, there) if "model nodes" in edge[:2]}
    assert touching == {
        ("gateway", "model nodes", 7070),
        ("model nodes", "model nodes", 7070),
    }


def test_an_installation_without_the_hub_has_no_way_out(render: Render) -> None:
    """Nor have the nodes of a pool, which might download, or of an hf:// model made by hand."""
    rendered = render({"networkPolicy": {**NARROW["networkPolicy"], "huggingFace": False}})
    net, there = network(rendered, rendered.config), ends(rendered)
    for name in OURS:
        assert not any(net.connects(there[name], there["internet"], port) for port in PORTS)


def test_clients_can_be_named(render: Render) -> None:
    may = {"matchLabels": {NAMESPACE_NAME: "ingress"}}
    rendered = render({"networkPolicy": {"clients": [{"namespaceSelector": may}]}})
    net, there = network(rendered, rendered.config), ends(rendered)
    assert net.connects(End({}, "ingress"), there["gateway"], 8080)
    assert not net.connects(there["anyone"], there["gateway"], 8080)
    assert net.connects(there["helm test"], there["gateway"], 8080)


def test_a_prometheus_elsewhere_reads_metrics_and_is_asked(render: Render) -> None:
    values = {"prometheus": {"enabled": False, "url": "http://prometheus.monitoring:9090"}}
    rendered = render(values)
    net = network(rendered, rendered.config)
    there = {**ends(render()), **{name: End(meta["labels"]) for name, meta, _ in rendered.pods()}}
    for component in ("gateway", "operator", "model nodes"):
        assert net.connects(there["another Prometheus"], there[component], 9090)
        assert not net.connects(there["a neighbour"], there[component], 9090)
        assert not net.connects(there["another Prometheus"], there[component], 7070)
    assert net.connects(there["operator"], there["another Prometheus"], 9090)


def test_cluster_wide_nodes_of_every_namespace_are_reached(render: Render) -> None:
    rendered = render({"operator": {"namespaced": False}})
    # The other namespace's policy is made by the same operator.
    net = network(rendered, rendered.config)
    owner = {"kind": "DiffusionModel", "metadata": {"name": "dit", "uid": "u"}, "spec": {}}
    nodes = Nodes(owner, "dit", model_labels("dit"), 1, 1, content={})
    (policy,) = [
        each for each in children(nodes, rendered.config) if each["kind"] == "NetworkPolicy"
    ]
    net = Network([*net.policies, ("other", policy["spec"])])
    there = ends(rendered)
    far = there["another namespace's nodes"]
    assert net.connects(there["operator"], far, 7070)
    assert net.connects(there["Prometheus"], far, 9090)
    # Each gateway serves its own namespace.
    assert not net.connects(there["gateway"], far, 7070)
    near = End(there["gateway"].labels, "other")
    assert net.connects(near, far, 7070)
