# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Random edits, with the operator killed at random points, end with exactly the wanted objects."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.kube import ApiError, ControlPlane, Kube, is_true
from tests.cluster.operator.conftest import NewOperator
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.running import OperatorProcess
from tests.cluster.operator.test_operator_objects import rest, wait_quiet
from tests.cluster.operator.wanted import (
    CHILDREN,
    models_of,
    models_of_all,
    pipeline,
    present,
    users_of,
    wait_for_models,
    workflow,
)

NAMES = [f"w{number}" for number in range(8)]
LONG = 180.0


class Churn:
    """Edits drawn from a seed. `there` is what a user would say is applied."""

    def __init__(self, kube: Kube, operator: OperatorProcess, folder: Path, seed: int) -> None:
        self.there: dict[str, dict] = {}
        self.broken: set[str] = set()
        self.done: Counter[str] = Counter()
        self._kube = kube
        self._operator = operator
        self._die = random.Random(seed)
        self._pipelines = [pipeline(folder / f"p{number}") for number in range(4)]
        self._folder = folder

    def edit(self) -> None:
        edits = ["create", "create", "update", "update", "share", "delete", "break", "repair"]
        edit = self._die.choice([*edits, "drift", "drift", "kill"])
        self.done[edit] += getattr(self, f"_{edit}")()
        # Some edits come in one breath, some while the operator is at work, some after it.
        time.sleep(self._die.choice([0, 0, 0.02, 0.1, 0.3]))

    def settle(self) -> None:
        for name in sorted(self.broken):
            self._apply(name, self._definition(name))

    def _definition(self, name: str) -> dict:
        die = self._die
        spec: dict = {}
        models: dict = {}
        if die.random() < 0.3:
            models["text_encoder_3"] = {"enabled": False}
        if die.random() < 0.3:
            models["vae"] = {"scaling": {"minReplicas": 1, "maxReplicas": die.randint(1, 3)}}
        if die.random() < 0.2:
            models["transformer"] = {"dtype": "bfloat16"}
        if models:
            spec["models"] = models
        if die.random() < 0.2:
            spec["slo"] = {"deadlineSeconds": die.randint(1, 100)}
        return workflow(name, die.choice(self._pipelines), **spec)

    def _apply(self, name: str, definition: dict) -> None:
        self._kube.apply(definition)
        self.there[name] = definition
        self.broken.discard(name)

    def _create(self) -> bool:
        free = [name for name in NAMES if name not in self.there]
        if not free:
            return False
        name = self._die.choice(free)
        self._apply(name, self._definition(name))
        return True

    def _update(self) -> bool:
        name = self._some()
        if name:
            self._apply(name, self._definition(name))
        return bool(name)

    def _share(self) -> bool:
        """Another workflow becomes the same as this one: all its models are shared."""
        name, like = self._some(), self._some()
        if not name or like in self.broken or like == name:
            return False
        self._apply(name, {**self.there[like], "metadata": {"name": name}})
        return True

    def _delete(self) -> bool:
        name = self._some()
        if name:
            self._kube.delete("dwf", name)
            del self.there[name]
            self.broken.discard(name)
        return bool(name)

    def _break(self) -> bool:
        name = self._some()
        if not name:
            return False
        wrong = self._die.choice(["missing", "half"])
        if wrong == "half":
            pipeline(self._folder / "half", without=["vae"])
        self._apply(name, workflow(name, f"file://{self._folder}/{wrong}"))
        self.broken.add(name)
        return True

    def _repair(self) -> bool:
        if not self.broken:
            return False
        name = self._die.choice(sorted(self.broken))
        self._apply(name, self._definition(name))
        return True

    def _drift(self) -> bool:
        """Somebody else deletes or edits a child."""
        kind = self._die.choice(CHILDREN)
        names = sorted(present(self._kube, kind))
        if not names:
            return False
        name = self._die.choice(names)
        try:
            if self._die.random() < 0.5:
                self._kube.delete(kind, name)
            else:
                patch = {"metadata": {"labels": {"app.kubernetes.io/managed-by": "somebody"}}}
                self._kube.patch(kind, name, patch)
        except ApiError as error:
            if error.status != 404:
                raise
        return True

    def _kill(self) -> bool:
        self._operator.kill()
        time.sleep(self._die.choice([0, 0.2, 1.0]))
        self._operator.start()
        return True

    def _some(self) -> str:
        return self._die.choice(sorted(self.there)) if self.there else ""


@pytest.mark.parametrize(
    ("edits", "seed"),
    [
        pytest.param(40, 7, id="40"),
        pytest.param(200, 11, id="200", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_random_edits_and_kills_end_with_exactly_the_wanted_objects(
    edits: int,
    seed: int,
    control_plane: ControlPlane,
    new_operator: NewOperator,
    kube: Kube,
    kubelet: FakeKubelet,
    tmp_path: Path,
) -> None:
    operator = new_operator()
    operator.start()
    churn = Churn(kube, operator, tmp_path / "pipelines", seed)
    for _ in range(edits):
        churn.edit()
    assert churn.done["kill"] >= edits // 40
    churn.settle()
    operator.wait_ready()

    wanted = models_of_all(churn.there.values())
    for name in churn.there:
        kube.wait_for("dwf", name, is_true("Ready"), timeout=LONG)
    wait_for_models(kube, wanted, timeout=LONG)
    check_owners(kube, churn.there)
    wait_quiet(control_plane, kube)
    check_owners(kube, churn.there)
    assert present(kube, "DiffusionModel") == wanted
    writes, changed = rest(control_plane, operator, kube, 60.0 if edits > 100 else 3.0)
    assert (writes, changed) == ([], {})


def check_owners(kube: Kube, there: dict[str, dict]) -> None:
    """Each model names exactly its users, and each child the model that is there now."""
    users: dict[str, set[str]] = {}
    for name, definition in there.items():
        for identity in models_of(definition).values():
            users.setdefault(identity, set()).add(name)
    models = {m["metadata"]["name"]: m for m in kube.list("DiffusionModel")}
    workflows = {w["metadata"]["name"]: w["metadata"]["uid"] for w in kube.list("dwf")}
    assert set(workflows) == set(there)
    for name, expected in users.items():
        assert users_of(models[name]) == expected
        for owner in models[name]["metadata"]["ownerReferences"]:
            assert owner["uid"] == workflows[owner["name"]]
        for kind in CHILDREN:
            child = kube.get(kind, name)
            (owner,) = child["metadata"]["ownerReferences"]
            assert owner["uid"] == models[name]["metadata"]["uid"]
            assert child["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "kubediffusion"
    revisions = kube.list("ControllerRevision", selector="kubediffusion.io/workflow")
    assert {r["metadata"]["labels"]["kubediffusion.io/workflow"] for r in revisions} == set(there)
