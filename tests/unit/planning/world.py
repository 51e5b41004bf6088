# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes for plans to be carried out in: a store, a garbage collector, kubelets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kubediffusion.workflow import PipelineIndex
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning import Observed, Plan, PlanCache, plan
from kubediffusion_operator.planning.residency import loras_in
from kubediffusion_operator.planning.types import (
    EventRecord,
    ModelReport,
    Object,
    Ref,
    ResidencyReport,
    Resolution,
    ResolutionError,
)

FIELDS = {
    "DiffusionWorkflow": "workflows",
    "DiffusionModel": "models",
    "ModelPool": "pools",
    "ControllerRevision": "revisions",
    "Deployment": "deployments",
    "Service": "services",
    "PodDisruptionBudget": "pdbs",
    "NetworkPolicy": "networkpolicies",
    "ConfigMap": "configmaps",
    "Pod": "pods",
}
INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    },
    "0" * 40,
)
CONFIG = OperatorConfig(image="registry.example/node:1")
Key = tuple[str, str]


class World:
    """One namespace. `now` is moved by `wait`; each object gets a version with each change."""

    def __init__(self, config: OperatorConfig = CONFIG) -> None:
        self.config = config
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.objects: dict[Key, Object] = {}
        self.resolutions: dict[tuple[str, int], Resolution | ResolutionError] = {}
        self.residency: dict[str, ResidencyReport] = {}
        self.refused: dict[tuple[str, str], str] = {}
        self.cache = PlanCache()
        self.events: list[EventRecord] = []
        # What the sources say of each workflow; a missing one says INDEX.
        self.sources: dict[str, Resolution | ResolutionError] = {}
        # Kinds of failure of the pods of a model or pool, and models that never get ready.
        self.broken: dict[str, Object] = {}
        self.unready: set[str] = set()
        # Bytes by model.
        self.sizes: dict[str, int] = {}
        # Tasks on each node, by model; None: its nodes are of a version that does not say.
        self.tasks: dict[str, int | None] = {}
        # Models that gateways say they need; all others are of gateways or nodes that do not say.
        self.needed: set[str] = set()
        self._counter = 0

    # ------------------------------------------------------------ users

    def workflow(self, name: str, **spec: Any) -> Object:
        """Applies a workflow; the pipeline's source is `hf://org/<model>`."""
        model = spec.pop("model", "base")
        source = {"uri": f"hf://org/{model}", **spec.pop("source", {})}
        pipeline = {"preset": "StableDiffusion3", "source": source}
        return self.put("DiffusionWorkflow", name, {"pipeline": pipeline, **spec})

    def put(self, kind: str, name: str, spec: Object, **metadata: Any) -> Object:
        wanted = {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, **metadata},
            "spec": spec,
        }
        return self.apply(wanted)

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    # ------------------------------------------------------------ the API server

    def apply(self, wanted: Object) -> Object:
        wanted = copy.deepcopy(wanted)
        meta = wanted["metadata"]
        key = wanted["kind"], meta["name"]
        known = self.objects.get(key)
        if known is None:
            self._counter += 1
            meta |= {
                "uid": f"uid-{self._counter}",
                "creationTimestamp": self.time,
                "generation": 1,
                "resourceVersion": str(self._counter),
            }
            self.objects[key] = _defaulted(wanted)
            return self.objects[key]
        for name in ("uid", "creationTimestamp", "generation", "resourceVersion"):
            meta[name] = known["metadata"][name]
        if "status" in known:
            wanted["status"] = known["status"]
        if key[0] == "DiffusionModel" and "replicas" in known["spec"]:
            wanted["spec"].setdefault("replicas", known["spec"]["replicas"])
        return self._store(key, _defaulted(wanted))

    def _store(self, key: Key, wanted: Object) -> Object:
        known = self.objects[key]
        if wanted == known:
            return known
        self._counter += 1
        meta = wanted["metadata"]
        meta["resourceVersion"] = str(self._counter)
        if wanted.get("spec") != known.get("spec"):
            meta["generation"] = known["metadata"]["generation"] + 1
        self.objects[key] = wanted
        return wanted

    def edit(self, kind: str, name: str, **fields: Any) -> Object:
        """Somebody else changes top-level fields of an object."""
        wanted = copy.deepcopy(self.objects[kind, name])
        wanted.update(copy.deepcopy(fields))
        return self._store((kind, name), wanted)

    def set_spec(self, kind: str, name: str, **fields: Any) -> Object:
        spec = {**self.objects[kind, name]["spec"], **fields}
        return self.edit(kind, name, spec=spec)

    def delete(self, kind: str, name: str, uid: str = "") -> None:
        found = self.objects.get((kind, name))
        if found is not None and uid in ("", found["metadata"]["uid"]):
            del self.objects[kind, name]

    def collect(self) -> None:
        """The garbage collector: what has owners, none of which is there, goes."""
        while True:
            alive = {found["metadata"]["uid"] for found in self.objects.values()}
            gone = [
                key
                for key, found in self.objects.items()
                if (owners := found["metadata"].get("ownerReferences"))
                and not any(owner["uid"] in alive for owner in owners)
            ]
            for key in gone:
                del self.objects[key]
            if not gone:
                return

    # ------------------------------------------------------------ kubelets and nodes

    def run_pods(self) -> None:
        """Deployments get their pods, and pods run, except those of `broken` and `unready`."""
        for (kind, name), deployment in list(self.objects.items()):
            if kind != "Deployment":
                continue
            replicas = deployment["spec"]["replicas"]
            template = deployment["spec"]["template"]["metadata"]
            mine = sorted(
                pod
                for (k, pod), found in self.objects.items()
                if k == "Pod" and pod.rpartition("-")[0] == name
            )
            for extra in mine[replicas:]:
                del self.objects["Pod", extra]
            ready = 0
            for number in range(replicas):
                ready += self._run_pod(f"{name}-{number}", name, deployment, template)
            status = {
                "observedGeneration": deployment["metadata"]["generation"],
                "replicas": replicas,
                "readyReplicas": ready,
            }
            self.edit("Deployment", name, status=status)

    def _run_pod(
        self, name: str, owner: str, deployment: Object, template: Mapping[str, Any]
    ) -> bool:
        ok = owner not in self.broken and owner not in self.unready
        running = {"name": "node", "restartCount": 0, "state": {"running": {}}}
        status: Object = {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "containerStatuses": [running],
            "conditions": [{"type": "Ready", "status": str(ok)}],
        }
        status |= self.broken.get(owner, {})
        reference = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": owner,
            "uid": deployment["metadata"]["uid"],
            "controller": True,
        }
        annotations = dict(template.get("annotations") or {})
        old = self.objects.get(("Pod", name))
        if old is not None and old["metadata"]["annotations"] != annotations:
            del self.objects["Pod", name]  # rolled out
        if ("Pod", name) not in self.objects:
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "labels": dict(template["labels"]),
                    "annotations": annotations,
                    "ownerReferences": [reference],
                },
                "spec": {},
            }
            self.apply(pod)
        self.edit("Pod", name, status=status)
        return ok

    def answer(self, made: Plan) -> None:
        """Nodes do what they are told."""
        for write in (*made.residency, *made.looks):
            models = tuple(
                ModelReport(
                    spec["identity"],
                    "READY",
                    nbytes=self.sizes.get(spec["identity"], 1),
                    digest=f"digest of {spec['uri']}",
                    tasks=self.tasks.get(spec["identity"], 0),
                    needed=spec["identity"] in self.needed,
                    loras=loras_in(spec),
                )
                for spec in write.content["models"]
            )
            self.residency[write.uid] = ResidencyReport(
                write.restarts, int(write.content["generation"]), models, answered=self.time
            )

    # ------------------------------------------------------------ the operator

    @property
    def time(self) -> str:
        return self.now.isoformat().replace("+00:00", "Z")

    def observed(self) -> Observed:
        found: dict[str, dict[str, Object]] = {field: {} for field in FIELDS.values()}
        for (kind, name), each in self.objects.items():
            labels = each["metadata"].get("labels") or {}
            ours = labels.get("app.kubernetes.io/managed-by") == "kubediffusion"
            if ours or each["apiVersion"].startswith("kubediffusion.io"):
                found[FIELDS[kind]][name] = each
        return Observed(
            namespace="team",
            now=self.time,
            config=self.config,
            resolutions=self.resolutions,
            residency=self.residency,
            refused=self.refused,
            **found,
        )

    def plan(self) -> Plan:
        return plan(self.observed(), self.cache)

    def carry_out(self, made: Plan, limit: int | None = None) -> None:
        """The first `limit` writes of a plan; all of it where None."""
        steps: list[Any] = []
        steps += [lambda each=each: self.apply(each) for each in made.apply]
        steps += [lambda ref=ref: self._delete(ref) for ref in made.delete]
        steps += [
            lambda each=each: self.set_spec("DiffusionModel", each.name, replicas=each.replicas)
            for each in made.scale
        ]
        steps += [
            lambda key=key, status=status: self._status(key, status)
            for key, status in made.status.items()
        ]
        for step in steps[:limit]:
            step()
        if limit is not None and limit < len(steps):
            return
        self.events += made.events
        for workflow in made.resolve:
            meta = workflow["metadata"]
            said = self.sources.get(meta["name"], Resolution(INDEX))
            self.resolutions[meta["uid"], meta["generation"]] = said
        self.answer(made)

    def _delete(self, ref: Ref) -> None:
        self.delete(ref.kind, ref.name, ref.uid)

    def _status(self, key: Key, status: Object) -> None:
        """Applied as the operator: what others wrote stays."""
        if key not in self.objects:
            return
        known = self.objects[key].get("status") or {}
        theirs = {k: v for k, v in known.items() if k == "scalingHistory"}
        self.edit(*key, status={**theirs, **status})

    def settle(self, rounds: int = 40) -> Plan:
        """Plans and carries out until nothing is left to do; pods run between the rounds."""
        made, looked = Plan(), False
        for _ in range(rounds):
            made = self.plan()
            if not made.looks:
                looked = False
            elif not looked:
                self.answer(made)
                made, looked = self.plan(), True
            if not made.writes and not made.residency and not made.resolve:
                before = len(self.objects)
                self.collect()
                self.run_pods()
                made = self.plan()
                same = len(self.objects) == before
                if same and not made.writes and not made.residency and not made.resolve:
                    return made
            self.carry_out(made)
            self.collect()
            self.run_pods()
        raise AssertionError(f"does not settle: {summary(made)}")

    # ------------------------------------------------------------ looking at it

    def all(self, kind: str) -> dict[str, Object]:
        return {name: found for (k, name), found in self.objects.items() if k == kind}

    def get(self, kind: str, name: str) -> Object:
        return self.objects[kind, name]

    def status(self, kind: str, name: str) -> Object:
        return self.objects[kind, name].get("status") or {}

    def condition(self, kind: str, name: str, of: str) -> Object:
        conditions = self.status(kind, name).get("conditions") or []
        return next((c for c in conditions if c["type"] == of), {})

    def role(self, workflow: str, role: str) -> str:
        """The identity that serves a role."""
        models = self.status("DiffusionWorkflow", workflow)["models"]
        return next(each["model"] for each in models if each["role"] == role)


def _defaulted(wanted: Object) -> Object:
    """What the API server fills in, some of it."""
    spec = wanted.get("spec") or {}
    if wanted["kind"] == "Deployment":
        pod = spec["template"]["spec"]
        pod.setdefault("restartPolicy", "Always")
        pod.setdefault("dnsPolicy", "ClusterFirst")
        for container in pod["containers"]:
            container.setdefault("terminationMessagePath", "/dev/termination-log")
    if wanted["kind"] == "Service":
        spec.setdefault("sessionAffinity", "None")
    if wanted["kind"] == "DiffusionModel":
        for name, value in (("compile", "none"), ("tiling", False), ("drainSeconds", 120)):
            spec.setdefault(name, value)
    return wanted


def summary(made: Plan) -> str:
    writes = [f"apply {each['kind']}/{each['metadata']['name']}" for each in made.apply]
    writes += [f"delete {ref.kind}/{ref.name}" for ref in made.delete]
    writes += [f"status {key}" for key in made.status]
    writes += [f"scale {each.name}" for each in made.scale]
    writes += [f"residency {each.pod}" for each in made.residency]
    writes += [f"resolve {each['metadata']['name']}" for each in made.resolve]
    return ", ".join(writes) or "nothing"
