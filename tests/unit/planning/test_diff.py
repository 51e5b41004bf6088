# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""When an object has to be written, and when not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion_operator.planning.diff import contains, needs_write, stamped
from kubediffusion_operator.planning.names import APPLIED
from kubediffusion_operator.planning.podtemplate import BadFragmentError, merged


def wanted() -> dict[str, Any]:
    return stamped(
        {
            "kind": "Deployment",
            "metadata": {"name": "d", "labels": {"a": "1"}},
            "spec": {
                "replicas": 0,
                "template": {
                    "spec": {
                        "containers": [
                            {
                                "name": "node",
                                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                                "ports": [{"containerPort": 7070, "protocol": "TCP"}],
                                "resources": {"limits": {"memory": "1024Mi", "cpu": "0.5"}},
                            }
                        ],
                        "tolerations": [{"key": "gpu"}, {"key": "spot"}],
                        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1024Mi"}}],
                    }
                },
            },
        }
    )


def observed(**changes: Any) -> dict[str, Any]:
    """As the API server gives it back: with defaults, and quantities in its own spelling."""
    found = copy.deepcopy(wanted())
    found["metadata"] |= {"uid": "u", "resourceVersion": "7", "managedFields": []}
    found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "3"
    pod = found["spec"]["template"]["spec"]
    pod["dnsPolicy"] = "ClusterFirst"
    node = pod["containers"][0]
    node["env"].reverse()
    node["terminationMessagePath"] = "/dev/termination-log"
    node["resources"]["limits"] = {"memory": "1Gi", "cpu": "500m"}
    pod["volumes"][0]["emptyDir"]["sizeLimit"] = "1Gi"
    pod["containers"].insert(0, {"name": "injected", "image": "mesh"})
    found["status"] = {"replicas": 1}
    return {**found, **changes}


def test_defaults_and_other_peoples_parts_are_no_difference() -> None:
    assert not needs_write(wanted(), observed())


def test_what_is_not_there_is_written() -> None:
    assert needs_write(wanted(), None)


def pod(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"]["template"]["spec"]


def node(found: dict[str, Any]) -> dict[str, Any]:
    return pod(found)["containers"][1]


CHANGES = {
    "a value": lambda o: o["spec"].update(replicas=1),
    "a label": lambda o: o["metadata"]["labels"].pop("a"),
    "a variable": lambda o: node(o)["env"][0].update(value="9"),
    "a variable gone": lambda o: node(o)["env"].pop(),
    "a container gone": lambda o: pod(o)["containers"].pop(),
    "a quantity": lambda o: node(o)["resources"]["limits"].update(memory="1025Mi"),
    "a limit gone": lambda o: node(o)["resources"]["limits"].pop("cpu"),
    "the order where it counts": lambda o: pod(o)["tolerations"].reverse(),
    "one more where the list is whole": lambda o: pod(o)["tolerations"].append({"key": "x"}),
    "a list for a map": lambda o: o["metadata"].update(labels=["a"]),
    "what we applied last": lambda o: o["metadata"]["annotations"].update({APPLIED: "old"}),
    "our mark gone": lambda o: o["metadata"]["annotations"].pop(APPLIED),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_difference_is_written(change: Any) -> None:
    found = observed()
    change(found)
    assert needs_write(wanted(), found)


def test_true_is_not_one() -> None:
    assert not contains({"a": 1}, {"a": True})


@pytest.mark.parametrize("empty", [{}, [], "", False, 0])
def test_the_api_server_leaves_out_what_is_empty(empty: object) -> None:
    assert contains({}, {"a": empty})
    assert not contains({"a": "x"}, {"a": empty})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "type", "a", "b"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(JSON)
def test_everything_contains_itself(value: object) -> None:
    assert contains(copy.deepcopy(value), value)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.text(max_size=3), JSON)
def test_more_is_contained_too(value: dict[str, object], key: str, extra: object) -> None:
    assert contains({key: extra, **value}, value)


# ---------------------------------------------------------------- fragments of pod templates


def test_fragments_are_laid_over_by_name() -> None:
    base = {
        "spec": {
            "nodeSelector": {"a": "1"},
            "volumes": [{"name": "cache", "emptyDir": {}}],
            "containers": [
                {"name": "node", "image": "i", "env": [{"name": "A", "valueFrom": {"x": 1}}]}
            ],
        }
    }
    fragment = {
        "spec": {
            "nodeSelector": {"b": "2"},
            "hostname": "h",
            "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}],
            "containers": [{"name": "node", "env": [{"name": "A", "value": "1"}]}],
        }
    }
    before = copy.deepcopy((base, fragment))
    spec = merged(base, fragment)["spec"]
    assert (base, fragment) == before
    assert spec["nodeSelector"] == {"a": "1", "b": "2"}
    assert spec["hostname"] == "h"
    # Half of one kind of volume and half of another would be none; so with a variable.
    assert spec["volumes"] == [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}]
    assert spec["containers"] == [
        {"name": "node", "image": "i", "env": [{"name": "A", "value": "1"}]}
    ]


def test_a_null_takes_a_field_out() -> None:
    assert merged({"spec": {"a": 1, "b": {"c": 2}}}, {"spec": {"a": None, "b": {"c": None}}}) == {
        "spec": {"b": {}}
    }


@pytest.mark.parametrize(
    ("fragment", "says"),
    [
        ({"spec": []}, "podTemplate.spec is a map, not a list"),
        ({"spec": {"containers": {}}}, "podTemplate.spec.containers is a list, not a map"),
        ({"spec": {"containers": [{}]}}, "podTemplate.spec.containers[0] needs a name"),
        ({"spec": {"volumes": ["x"]}}, "podTemplate.spec.volumes[0] needs a name"),
        (
            {"spec": {"containers": [{"name": "node", "env": "x"}]}},
            "podTemplate.spec.containers[0].env is a list, not a text",
        ),
    ],
)
def test_what_is_no_pod_template_is_told_where(fragment: dict[str, Any], says: str) -> None:
    base = {"spec": {"containers": [{"name": "node", "env": []}]}}
    with pytest.raises(BadFragmentError) as caught:
        merged(base, fragment)
    assert str(caught.value) == says
