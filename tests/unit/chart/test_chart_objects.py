# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What Helm makes of the chart: the behaviour of its objects, not their text."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from kubediffusion.cluster.flags import Options, parse
from kubediffusion_operator.flags import parse as parse_operator
from tests.unit.chart.conftest import Render
from tests.unit.chart.rendering import (
    CHART,
    EXAMPLES,
    Helm,
    HelmError,
    Object,
    Rendered,
    container,
    variables,
)


def test_lint_finds_nothing(helm: Helm) -> None:
    for values in (CHART / "values.yaml", *EXAMPLES):
        assert "0 chart(s) failed" in helm("lint", "--strict", CHART, "--values", values)


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_example_values_render_and_give_a_valid_configuration(render: Render, values: str) -> None:
    rendered = render(values)
    if rendered.names("ConfigMap") & {"kd-kubediffusion-operator"}:
        assert rendered.config.image


def test_an_old_kubernetes_is_refused(helm: Helm) -> None:
    with pytest.raises(HelmError, match=r">=1\.30\.0-0 which is incompatible with Kubernetes"):
        helm("template", "kd", CHART, "--kube-version", "1.29.9")


def test_pods_are_restricted_and_say_so_themselves(either: Rendered) -> None:
    for name, _, spec in either.pods():
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys(), name
        assert all("hostPath" not in volume for volume in spec.get("volumes", ())), name
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert {"cpu", "memory"} <= each["resources"]["requests"].keys(), name
            assert "memory" in each["resources"]["limits"], name


def test_only_pods_that_ask_the_api_server_have_a_token(either: Rendered) -> None:
    for name, _, spec in either.pods():
        asks = not name.endswith("-test")
        assert spec["automountServiceAccountToken"] is asks, name
        assert ("serviceAccountName" in spec) is asks, name
    for account in either.of("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_two_operators_never_run_at_once(either: Rendered) -> None:
    spec = either.get("Deployment", "operator")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_the_operator_starts_anew_when_its_configuration_changes(render: Render) -> None:
    def checksum(values: dict[str, object]) -> str:
        template = render(values).get("Deployment", "operator")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    same, other = {"gateway": {"replicas": 5}}, {"nodes": {"gpuBudget": 7}}
    assert checksum({}) == checksum(same) != checksum(other)


def test_an_update_of_gateways_takes_none_away_first(plain: Rendered) -> None:
    deployment = plain.get("Deployment", "gateway")["spec"]
    assert deployment["replicas"] == 2
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    budget = plain.get("PodDisruptionBudget", "gateway")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    assert budget["selector"] == deployment["selector"]


@pytest.mark.parametrize(("delay", "drain"), [(5, 120), (0, 30), (15, 600)])
def test_a_gateway_may_take_its_time_to_stop(render: Render, delay: int, drain: int) -> None:
    rendered = render({"gateway": {"shutdownDelaySeconds": delay, "drainSeconds": drain}})
    gateway = container(rendered, "gateway")
    pod = rendered.get("Deployment", "gateway")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > delay + drain
    options = gateway_options(gateway)
    assert (options.shutdown_delay, options.drain_seconds) == (delay, drain)


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ({}, False),  # two replicas, and clients come to either
        ({"replicas": 1}, True),
        ({"replicas": 1, "autoscaling": {"enabled": True}}, False),
        ({"service": {"sessionAffinity": "ClientIP"}}, True),
        ({"imageUrls": True}, True),
        ({"replicas": 1, "imageUrls": False}, False),
    ],
)
def test_images_by_url_are_taken_only_where_they_are_found_again(
    render: Render, values: Object, taken: bool
) -> None:
    rendered = render({"gateway": values})
    assert gateway_options(container(rendered, "gateway")).doors.image_urls is taken


def gateway_options(gateway: Object) -> Options:
    """What the process makes of its environment."""
    given = {
        name: value if isinstance(value, str) else f"<{next(iter(value))}>"
        for name, value in variables(gateway).items()
    }
    return parse([], given)


def test_the_gateway_understands_what_the_chart_tells_it(
    plain: Rendered, everything: Rendered
) -> None:
    known = {f"KUBEDIFFUSION_{field.name.upper()}" for field in fields(Options)}
    for rendered in (plain, everything):
        told = {name for name in variables(container(rendered, "gateway")) if "KUBED" in name}
        assert told - known == set()
    ports = {port["name"]: port["containerPort"] for port in container(plain, "gateway")["ports"]}
    options = gateway_options(container(everything, "gateway"))
    for door in ("http", "grpc", "metrics"):
        assert getattr(options, door) == f"0.0.0.0:{ports[door]}"
    assert options.public_url == "https://images.example.com"
    assert options.job_database == "<secretKeyRef>"
    assert options.log_json is True
    assert options.doors.grpc_age == 120


def test_the_operator_understands_what_the_chart_tells_it(plain: Rendered, tmp_path: Path) -> None:
    (flag,) = container(plain, "operator")["args"]
    name, _, path = flag.partition("=")
    (mount,) = [
        one for one in container(plain, "operator")["volumeMounts"] if one["name"] == "config"
    ]
    text = plain.get("ConfigMap", "operator")["data"][path.removeprefix(f"{mount['mountPath']}/")]
    file = tmp_path / "operator.yaml"
    file.write_text(text)
    ports = {port["name"]: port["containerPort"] for port in container(plain, "operator")["ports"]}
    config = parse_operator([name, str(file)]).config
    assert {"health": config.health_port, "metrics": config.metrics_port} == ports


def test_replicas_belong_to_the_autoscaler_where_there_is_one(everything: Rendered) -> None:
    assert "replicas" not in everything.get("Deployment", "gateway")["spec"]
    scaler = everything.get("HorizontalPodAutoscaler", "gateway")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)
    assert scaler["scaleTargetRef"]["name"] == "kd-kubediffusion-gateway"


def test_every_selector_finds_the_pods_it_means(either: Rendered) -> None:
    """Services, budgets and Deployments: each selects the pods of its own component alone."""
    labels = {name: meta["labels"] for name, meta, _ in either.pods()}
    wanted = [(each, each["spec"]["selector"]) for each in either.of("Service")]
    for kind in ("PodDisruptionBudget", "Deployment"):
        wanted += [(each, each["spec"]["selector"]["matchLabels"]) for each in either.of(kind)]
    assert wanted
    for each, selector in wanted:
        found = {name for name, its in labels.items() if selector.items() <= its.items()}
        component = each["metadata"]["labels"]["app.kubernetes.io/component"]
        assert found == {f"kd-kubediffusion-{component}"}, each["metadata"]["name"]


def test_every_port_that_is_named_is_there(either: Rendered) -> None:
    ports = {
        meta["labels"]["app.kubernetes.io/component"]: {
            port["name"]: port["containerPort"]
            for each in spec["containers"]
            for port in each.get("ports", ())
        }
        for _, meta, spec in either.pods()
    }
    assert ports["gateway"] == {"http": 8080, "grpc": 50051, "metrics": 9090}
    assert ports["operator"] == {"health": 8081, "metrics": 9090}
    for service in either.of("Service"):
        component = service["spec"]["selector"]["app.kubernetes.io/component"]
        for port in service["spec"]["ports"]:
            assert ports[component].get(port["targetPort"]) == port["port"]
    for _, meta, spec in either.pods():
        known = ports[meta["labels"]["app.kubernetes.io/component"]]
        for each in spec["containers"]:
            probes = (each[key] for key in each if key.endswith("Probe"))
            assert all(probe["httpGet"]["port"] in known for probe in probes)


def test_api_keys_reach_the_gateway_by_file(render: Render, everything: Rendered) -> None:
    import base64

    secret = everything.get("Secret", "api-keys")
    assert base64.b64decode(secret["data"]["keys"]) == b"first-key\nsecond-key"
    for rendered, name in (
        (everything, "kd-kubediffusion-api-keys"),
        (render({"gateway": {"apiKeys": {"existingSecret": "mine"}}}), "mine"),
    ):
        gateway = container(rendered, "gateway")
        path = variables(gateway)["KUBEDIFFUSION_API_KEYS_FILE"]
        (mount,) = [one for one in gateway["volumeMounts"] if path.startswith(one["mountPath"])]
        volumes = rendered.get("Deployment", "gateway")["spec"]["template"]["spec"]["volumes"]
        assert {"name": mount["name"], "secret": {"secretName": name}} in volumes
        (test,) = rendered.get("Pod", "test")["spec"]["containers"]
        assert variables(test)["API_KEYS"]["secretKeyRef"] == {"name": name, "key": "keys"}


def test_without_api_keys_nothing_of_them_is_there(plain: Rendered) -> None:
    assert not plain.of("Secret")
    assert "KUBEDIFFUSION_API_KEYS_FILE" not in variables(container(plain, "gateway"))


def test_secrets_are_in_no_text_but_their_own(everything: Rendered) -> None:
    others = [each for each in everything if each["kind"] != "Secret"]
    assert "first-key" not in yaml.safe_dump_all(others)


def test_images_by_tag_or_digest(render: Render) -> None:
    digest = "sha256:" + "0" * 64
    rendered = render({"image": {"controlPlane": {"tag": "v9"}, "node": {"digest": digest}}})
    for component in ("operator", "gateway"):
        assert container(rendered, component)["image"] == "kubediffusion/control-plane:v9"
    assert rendered.config.image == f"kubediffusion/node@{digest}"


def test_a_release_can_be_part_of_another_installation(render: Render) -> None:
    """Just a gateway, or just an operator, leaves nothing of the other behind."""
    nobody = {"dashboards": {"enabled": False}, "rbac": {"aggregate": False}}
    off = {"enabled": False}
    gateway = render({"operator": off, "prometheus": off, **nobody})
    operator = render({"gateway": off, "prometheus": off, **nobody})
    for rendered, there in ((gateway, {"gateway", "test"}), (operator, {"operator"})):
        components = {
            each["metadata"]["labels"]["app.kubernetes.io/component"] for each in rendered
        }
        assert components == {*there, "model-nodes"}


def test_weights_come_from_a_claim(render: Render) -> None:
    made = render({"weights": {"create": True, "storageClassName": "-", "volumeName": "disk"}})
    claim = made.get("PersistentVolumeClaim", "weights")
    assert claim["spec"]["storageClassName"] == ""
    assert claim["spec"]["volumeName"] == "disk"
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert made.config.weights.claim_name == "kd-kubediffusion-weights"

    mine = render({"weights": {"existingClaim": "mine"}})
    assert not mine.of("PersistentVolumeClaim")
    assert mine.config.weights.claim_name == "mine"
    # The operator looks into file:// pipelines where the nodes find them.
    (mount,) = [m for m in container(mine, "operator")["volumeMounts"] if m["name"] == "weights"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/cache", True)


def test_the_operator_is_told_what_the_values_say(everything: Rendered) -> None:
    config = everything.config
    assert config.namespace == ""
    assert config.device == "cuda"
    assert config.scaling.gpu_budget == 4
    assert config.hf_token_secret is not None
    assert config.hf_token_secret.name == "hugging-face"
    assert config.node_defaults["metadata"] == {"labels": {"team": "pictures"}}
    spec = config.node_defaults["spec"]
    assert spec["nodeSelector"] == {"accelerator": "h100"}
    assert spec["imagePullSecrets"] == [{"name": "registry"}]


def test_a_budget_of_zero_is_a_budget(render: Render) -> None:
    assert render({"nodes": {"gpuBudget": 0}}).config.scaling.gpu_budget == 0
    assert render().config.scaling.gpu_budget is None


def test_the_operator_sees_its_namespace_or_all(render: Render, everything: Rendered) -> None:
    assert render().config.namespace == "pictures"
    assert render().names("ClusterRoleBinding") == set()
    assert everything.names("ClusterRoleBinding") == {
        "pictures:kd-kubediffusion-operator",
        "pictures:kd-kubediffusion-prometheus",
    }


def test_a_release_of_the_same_name_elsewhere_is_no_clash(render: Render) -> None:
    everywhere = {"operator": {"namespaced": False}}
    here, there = render(everywhere), render(everywhere, "--namespace", "elsewhere")
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        assert here.names(kind)
        assert not here.names(kind) & there.names(kind)


def test_long_names_still_fit(render: Render) -> None:
    rendered = render(None, release="a" * 53)
    assert max(len(each["metadata"]["name"]) for each in rendered.of("Deployment")) <= 52


def test_nothing_is_left_behind_by_helm(either: Rendered) -> None:
    """No finalizers; and no hooks that could hold up an installation or its removal."""
    for each in either:
        assert "finalizers" not in each["metadata"]
        hook = each["metadata"].get("annotations", {}).get("helm.sh/hook")
        assert hook in (None, "test"), each["metadata"]["name"]
