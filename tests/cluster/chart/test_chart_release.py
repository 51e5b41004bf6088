# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The chart is installed, changed and removed by Helm, as the API server sees it."""

from __future__ import annotations

import pytest

from tests.cluster.chart.conftest import Release
from tests.cluster.kube import ControlPlane, Kube, Object
from tests.unit.chart.rendering import EVERYTHING, EXAMPLES

# Kinds of the Prometheus Operator, which is not there.
NO_MONITORS = {"monitors": {"kind": "none"}, "alerts": {"prometheusRule": False}}
ALL = {**EVERYTHING, **NO_MONITORS}
# Cluster-scoped objects need no namespace to be found in.
CLUSTER_KINDS = ("ClusterRole", "ClusterRoleBinding")
# What is there in every namespace, and what namespaces are full of.
OTHERS = {"Event", "ConfigMap/kube-root-ca.crt", "ServiceAccount/default"}


def everything_in(kube: Kube, namespace: str) -> set[str]:
    """KIND/NAME of all objects of a namespace, and of cluster-scoped ones of its release."""
    found: set[str] = set()
    for resource in kube.request("GET", "/api/v1")["resources"]:
        found |= _listed(kube, "/api/v1", resource, namespace)
    for group in kube.request("GET", "/apis")["groups"]:
        root = f"/apis/{group['preferredVersion']['groupVersion']}"
        for resource in kube.request("GET", root)["resources"]:
            found |= _listed(kube, root, resource, namespace)
    return {each for each in found if each not in OTHERS and each.partition("/")[0] not in OTHERS}


def _listed(kube: Kube, root: str, resource: Object, namespace: str) -> set[str]:
    if "list" not in resource["verbs"] or "/" in resource["name"]:
        return set()
    if resource["namespaced"]:
        path, ours = f"{root}/namespaces/{namespace}/{resource['name']}", ""
    elif resource["kind"] in CLUSTER_KINDS:
        path, ours = f"{root}/{resource['name']}", f"{namespace}:"
    else:
        return set()
    items = kube.request("GET", path)["items"]
    names = {item["metadata"]["name"] for item in items}
    return {f"{resource['kind']}/{name}" for name in names if name.startswith(ours)}


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_the_api_server_takes_every_example(release: Release, values: object) -> None:
    flags = ["--dry-run=server"]
    if values == next(path for path in EXAMPLES if path.stem == "production"):
        flags += ["--set=monitors.kind=none,alerts.prometheusRule=false"]
    release.install(values, *flags)


@pytest.mark.parametrize("values", [{}, ALL], ids=["plain", "everything"])
def test_install_and_uninstall_leave_nothing(release: Release, admin: Kube, values: Object) -> None:
    before = everything_in(admin, release.namespace)
    # The volume's own test is another: the controller that lets go of claims does not run here.
    notes = release.install({**values, "weights": {"create": False}})
    assert "kubectl apply" in notes
    there = everything_in(admin, release.namespace)
    for each in release.objects():
        assert f"{each['kind']}/{each['metadata']['name']}" in there

    release.uninstall()

    # Pods and ReplicaSets go when the garbage collector has seen it.
    admin.wait_all("Pod", lambda pods: not pods, release.namespace)
    admin.wait_all("ReplicaSet", lambda sets: not sets, release.namespace)
    admin.wait_all("EndpointSlice", lambda slices: not slices, release.namespace)
    assert everything_in(admin, release.namespace) == before


def test_uninstalling_leaves_what_users_applied_and_nothing_holds_it(
    release: Release, admin: Kube
) -> None:
    kube = admin.within(release.namespace)
    release.install()
    kube.create(
        {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": "DiffusionWorkflow",
            "metadata": {"name": "tiny"},
            "spec": {
                "pipeline": {
                    "preset": "StableDiffusion3",
                    "source": {"uri": "builtin://tiny-sd3"},
                }
            },
        }
    )
    release.uninstall()
    assert kube.get("dwf", "tiny")["metadata"].get("finalizers") is None
    kube.delete("dwf", "tiny")
    kube.wait_gone("dwf", "tiny", timeout=10)


def test_downloaded_weights_outlive_the_release(release: Release, admin: Kube) -> None:
    release.install({"weights": {"create": True}})
    release.uninstall()
    claim = admin.get("PersistentVolumeClaim", "kd-kubediffusion-weights", release.namespace)
    assert claim["metadata"].get("deletionTimestamp") is None
    # And the next release takes it up again.
    release.install({"weights": {"create": True}}, "--take-ownership")


@pytest.mark.parametrize("values", [{}, ALL], ids=["plain", "everything"])
def test_pods_pass_the_restricted_level(release: Release, admin: Kube, values: Object) -> None:
    """The API server lets each pod in, and the controllers make the pods of the Deployments."""
    release.install(values)
    kube = admin.within(release.namespace)
    deployments = [each for each in release.objects() if each["kind"] == "Deployment"]
    for each in deployments:
        template = each["spec"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
        kube.create({**pod, "metadata": {"name": "try", **template["metadata"]}}, dry_run=True)
    for hook in yaml_of(release("get", "hooks", "kd")):
        kube.create(hook, dry_run=True)
    kube.wait_all("Pod", lambda pods: len({_owner(pod) for pod in pods}) == len(deployments))


def test_a_pod_below_the_level_is_refused(release: Release, admin: Kube) -> None:
    """The namespace of these tests does enforce it."""
    from tests.cluster.kube import ApiError

    container = {"name": "c", "image": "i"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {}}
    pod["spec"] = {"containers": [container]}
    with pytest.raises(ApiError, match="restricted"):
        admin.create(pod, release.namespace)


def test_values_can_be_changed_back_and_forth(release: Release, admin: Kube) -> None:
    release.install()
    plain = everything_in(admin, release.namespace) & _named(release)
    release.upgrade(ALL)
    kube = admin.within(release.namespace)
    assert kube.get("hpa", "kd-kubediffusion-gateway")["spec"]["maxReplicas"] == 8
    config = kube.get("ConfigMap", "kd-kubediffusion-operator")["data"]["operator.yaml"]
    assert "device: cuda" in config
    release.upgrade({"gateway": {"replicas": 5}})
    assert kube.get("Deployment", "kd-kubediffusion-gateway")["spec"]["replicas"] == 5
    assert kube.find("hpa", "kd-kubediffusion-gateway") is None
    release("rollback", "kd", "1")
    assert kube.get("Deployment", "kd-kubediffusion-gateway")["spec"]["replicas"] == 2
    assert everything_in(admin, release.namespace) & _named(release) == plain


def test_two_releases_of_one_name_live_side_by_side(
    release: Release, admin: Kube, control_plane: ControlPlane
) -> None:
    other = f"{release.namespace[:50]}-b"
    admin.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    twin = Release(release.helm, release.environment, other)
    try:
        release.install(ALL)
        twin.install(ALL)
        release.uninstall()
        assert admin.find("ClusterRole", f"{other}:kd-kubediffusion-operator")
    finally:
        twin.uninstall()
        admin.delete("Namespace", other)


def test_the_apis_crds_can_be_applied_again(control_plane: ControlPlane, release: Release) -> None:
    """As docs/kubernetes.md says to update them: Helm does not."""
    crds = release.helm("show", "crds", _chart(), **release.environment)
    words = control_plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=crds
    )
    assert words.count("serverside-applied") == 3


def _chart() -> str:
    from tests.unit.chart.rendering import CHART

    return str(CHART)


def _named(release: Release) -> set[str]:
    return {f"{each['kind']}/{each['metadata']['name']}" for each in release.objects()}


def _owner(pod: Object) -> str:
    return pod["metadata"]["labels"]["app.kubernetes.io/component"]


def yaml_of(text: str) -> list[Object]:
    import yaml

    return [each for each in yaml.safe_load_all(text) if each]
