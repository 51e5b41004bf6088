# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What each service account may do: what the API server says, word for word what the docs say."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.chart.conftest import Release
from tests.cluster.kube import ApiError, ControlPlane, Kube
from tests.unit.chart.rendering import ROOT

PAGE = (ROOT / "docs/kubernetes.md").read_text()
EVERYONE = "every account of Kubernetes"
CLUSTER_WIDE = {"operator": {"namespaced": False}}

# (resource or URL, verb)
Rights = set[tuple[str, str]]


def documented(account: str) -> Rights:
    """The rights of an account, by the table in docs/kubernetes.md."""
    table = PAGE.partition("### What each account may do")[2].partition("###")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", table, flags=re.MULTILINE)
    return {
        (resource, verb)
        for who, resources, verbs in rows
        if who in (account, EVERYONE)
        for resource in re.findall(r"`([^`]+)`", resources)
        for verb in verbs.split(", ")
    }


def allowed(plane: ControlPlane, account: str, home: str, namespace: str) -> Rights:
    """By `kubectl auth can-i --list` as that account of `home`, in `namespace`."""
    token = plane.token_for(account, home)
    lines = plane.kubectl("auth", "can-i", "--list", "-n", namespace, token=token).splitlines()
    head = lines[0]
    columns = [head.index(name) for name in ("Non-Resource URLs", "Resource Names", "Verbs")]
    rights: Rights = set()
    for line in lines[1:]:
        urls, names, verbs = (
            line[start:end] for start, end in zip(columns, [*columns[1:], None], strict=True)
        )
        assert names.strip() == "[]"
        what = line[: columns[0]].strip() or urls.strip().strip("[]")
        rights |= {(what, verb) for verb in verbs.strip().strip("[]").split()}
    return rights


@pytest.mark.parametrize("account", ["operator", "gateway", "prometheus"])
def test_each_account_may_do_what_is_documented_and_no_more(
    release: Release, control_plane: ControlPlane, account: str
) -> None:
    release.install()
    full = f"kd-kubediffusion-{account}"
    here = allowed(control_plane, full, release.namespace, release.namespace)
    assert here == documented(account)
    elsewhere = allowed(control_plane, full, release.namespace, "default")
    assert elsewhere == documented("nobody in particular")


@pytest.mark.parametrize(
    ("account", "everywhere"), [("operator", True), ("gateway", False), ("prometheus", True)]
)
def test_cluster_wide_the_same_rights_hold_everywhere(
    release: Release, control_plane: ControlPlane, account: str, everywhere: bool
) -> None:
    release.install(CLUSTER_WIDE)
    full = f"kd-kubediffusion-{account}"
    elsewhere = allowed(control_plane, full, release.namespace, "default")
    assert elsewhere == documented(account if everywhere else "nobody in particular")


def test_the_rules_of_the_operators_page_are_the_charts(release: Release) -> None:
    text = (ROOT / "docs/operator.md").read_text()
    (block,) = re.findall(r"```yaml\n# RBAC of the operator\n(.*?)```", text, flags=re.DOTALL)
    release.install()
    (role,) = [
        each
        for each in release.objects()
        if each["kind"] == "Role" and each["metadata"]["name"].endswith("-operator")
    ]
    assert _flat(role["rules"]) == _flat(yaml.safe_load(block)["rules"])


def _flat(rules: list[dict[str, list[str]]]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


# By role of the cluster: what its people may do with our kinds.
PEOPLE = {
    "view": [("get", "diffusionworkflows", True), ("delete", "diffusionworkflows", False)],
    "edit": [
        ("list", "modelpools", True),
        ("create", "diffusionworkflows", True),
        ("patch", "diffusionmodels/scale", True),
        ("patch", "modelpools/scale", True),
        ("patch", "diffusionmodels/status", False),
    ],
    "admin": [("deletecollection", "diffusionworkflows", True)],
}


@pytest.fixture
def aggregated(admin: Kube, release: Release) -> Iterator[None]:
    """The controller that fills view, edit and admin is not among the tests': its work, by hand."""
    release.install()
    roles = admin.list("ClusterRole")
    for name in PEOPLE:
        label = f"rbac.authorization.k8s.io/aggregate-to-{name}"
        rules = [
            rule
            for role in roles
            if role["metadata"].get("labels", {}).get(label) == "true"
            for rule in role["rules"] or ()
        ]
        body = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": f"{release.namespace}-{name}"},
            "rules": rules,
        }
        admin.create(body)
    yield
    for name in PEOPLE:
        admin.delete("ClusterRole", f"{release.namespace}-{name}")


@pytest.mark.parametrize("role", PEOPLE)
@pytest.mark.usefixtures("aggregated")
def test_people_get_our_kinds_by_the_roles_they_have(
    release: Release, control_plane: ControlPlane, admin: Kube, role: str
) -> None:
    namespace = release.namespace
    kube = admin.within(namespace)
    account = {"kind": "ServiceAccount", "name": "default", "namespace": namespace}
    kube.create(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": role},
            "subjects": [account],
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": f"{namespace}-{role}",
            },
        }
    )
    token = control_plane.token_for("default", namespace)
    for verb, resource, may in PEOPLE[role]:
        plural, _, sub = resource.partition("/")
        what = [f"{plural}.kubediffusion.io", *([f"--subresource={sub}"] if sub else [])]
        answer = control_plane.kubectl(
            "auth", "can-i", verb, *what, "-n", namespace, token=token, check=False
        )
        assert answer.splitlines()[-1] == ("yes" if may else "no"), (verb, resource)


def test_the_gateway_really_is_refused_what_is_not_its_own(
    release: Release, control_plane: ControlPlane, admin: Kube
) -> None:
    release.install()
    token = control_plane.token_for("kd-kubediffusion-gateway", release.namespace)
    gateway = admin.within(release.namespace).acting_as(token)
    path = f"/apis/kubediffusion.io/v1alpha1/namespaces/{release.namespace}/diffusionworkflows"
    assert gateway.request("GET", path)["items"] == []
    for method, other in (
        ("GET", f"/api/v1/namespaces/{release.namespace}/secrets"),
        ("GET", path.replace(release.namespace, "default")),
        ("DELETE", path),
    ):
        with pytest.raises(ApiError, match="403"):
            gateway.request(method, other)
