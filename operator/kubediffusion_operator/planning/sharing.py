# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One model for all workflows that use it: whose word counts, and who is told that his does not.

Of workflows that share a model the larger minReplicas and the larger maxReplicas count. Of its
resources, placement, podTemplate and drainSeconds the oldest workflow decides, also by saying
nothing: a workflow that comes later neither restarts nor moves what another one runs on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel

from kubediffusion.api.identity import canonical_uri
from kubediffusion.api.serving import ModelOverride
from kubediffusion.api.workflow import DiffusionWorkflow
from kubediffusion.workflow import LoraDecl, ModelRef
from kubediffusion.workflow.colocation import hosts_of, is_helper
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.names import age_key, name_of
from kubediffusion_operator.planning.revisions import Known
from kubediffusion_operator.planning.types import LoraKey, Object

MAX_LORAS = 1024  # of one model, as its CRD says
# Of these the oldest workflow decides.
_OLDEST = ("resources", "placement", "pod_template", "drain_seconds")


@dataclass(frozen=True, slots=True)
class Use:
    """One role of one revision of a workflow. `override` is what that revision says of it."""

    workflow: Object
    role: str
    ref: ModelRef
    override: ModelOverride
    # Of the revision that the workflow should serve, not of one that goes.
    newest: bool
    replace: bool
    # Of a model without nodes of its own: the role whose nodes it is on, and the fields of
    # `override` that would be about nodes.
    host: str = ""
    idle: tuple[str, ...] = ()


@dataclass
class Shared:
    """One identity and all its uses, the oldest workflow's first."""

    identity: str
    uses: list[Use] = field(default_factory=list[Use])

    @property
    def ref(self) -> ModelRef:
        return self.uses[0].ref

    @property
    def workflows(self) -> list[Object]:
        """Each once, the oldest first."""
        return list({name_of(use.workflow): use.workflow for use in self.uses}.values())

    @property
    def users(self) -> list[dict[str, str]]:
        """As ModelStatus.referencedBy."""
        pairs = {(name_of(use.workflow), use.role) for use in self.uses}
        return [{"name": name, "role": role} for name, role in sorted(pairs)]

    @property
    def replace(self) -> bool:
        """All its users want the old to go before the new comes."""
        return all(use.replace for use in _spoken(self.uses))


def shared(wanted: Iterable[tuple[Object, Known, bool]], cache: PlanCache) -> dict[str, Shared]:
    """By identity. `wanted` are the revisions to be served: (workflow, revision, is the newest)."""
    found: dict[str, Shared] = {}
    ordered = sorted(wanted, key=lambda each: (age_key(each[0]), not each[2]))
    for workflow, known, newest in ordered:
        key = ("uses", workflow["metadata"].get("uid"), known.revision.name)
        for said in cache.get(key, lambda known=known: _roles(known)):
            replace = known.definition.spec.strategy == "Replace"
            use = Use(workflow, said.role, said.ref, said.override, newest, replace, *said.hosted)
            found.setdefault(said.ref.identity, Shared(said.ref.identity)).uses.append(use)
    return found


@dataclass(frozen=True, slots=True)
class _Role:
    role: str
    ref: ModelRef
    override: ModelOverride
    # Use.host and Use.idle
    hosted: tuple[str, tuple[str, ...]] = ("", ())


def _roles(known: Known) -> list[_Role]:
    definition: DiffusionWorkflow = known.definition
    none, hosts = ModelOverride(), hosts_of(known.resolved)
    found: list[_Role] = []
    for role, ref in known.resolved.models.items():
        override = definition.spec.models.get(role, none)
        host = next(iter(hosts.get(role, ())), "transformer") if is_helper(ref.component) else ""
        idle = _idle(override, definition.spec.models.get(host, none)) if host else ()
        found.append(_Role(role, ref, override, (host, idle)))
    return found


def _idle(override: ModelOverride, host: ModelOverride) -> tuple[str, ...]:
    """What a helper's override says of nodes that it does not have. Its resources are added to
    its host's, unless that is in a pool; naming the same pool says nothing new."""
    fields = ["pod_template", "drain_seconds", "scaling"]
    fields += ["placement"] if override.placement != host.placement else []
    fields += ["resources"] if host.placement is not None else []
    return tuple(name for name in fields if getattr(override, name) is not None)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Something that a workflow says of a shared model and that does not count."""

    workflow: str
    role: str
    field: str
    # The workflow whose word counts, and its name for the model; empty: made by hand.
    winner: str
    winner_role: str = ""
    # The role whose nodes the model is on.
    host: str = ""

    def __str__(self) -> str:
        name = _camel(self.field)
        if self.host:
            return (
                f"models.{self.role}.{name}: it has no nodes of its own, it runs on those of "
                f"{self.host} and scales with them; say it under models.{self.host}"
            )
        if not self.winner and self.field == "loras":
            return (
                f"models.{self.role}.loras: the DiffusionModel was made by hand and does not "
                "declare all LoRAs of this workflow; add them to its spec.loras, with the same "
                "source and revision"
            )
        if not self.winner:
            return f"models.{self.role}.{name}: the DiffusionModel was made by hand and says it"
        return (
            f"models.{self.role}.{name}: the model is shared with {self.winner}, which is older "
            f"and decides; set models.{self.winner_role}.{name} there, or use weights of your own"
        )


def serving(model: Shared) -> tuple[dict[str, Any], list[Conflict]]:
    """How the model is served, as fields of ModelSpec; and what of its users' words is lost."""
    spoken = _spoken(model.uses)
    oldest = spoken[0]
    spec: dict[str, Any] = {}
    conflicts = [
        Conflict(name_of(use.workflow), use.role, name, "", host=use.host)
        for use in spoken
        for name in use.idle
    ]
    if oldest.host:
        value = oldest.override.resources
        conflicts += _losers("resources", value, oldest, spoken[1:])
        return ({"resources": _plain(value)} if value is not None else {}), conflicts
    for name in _OLDEST:
        value = getattr(oldest.override, name)
        if value is not None:
            spec[_camel(name)] = _plain(value)
        conflicts += _losers(name, value, oldest, spoken[1:])
    scaling, lost = _scaling(spoken)
    if scaling is not None:
        spec["scaling"] = scaling
    return spec, conflicts + lost


def unheard(model: Shared, declared: Set[LoraKey]) -> list[Conflict]:
    """What its users say of a model that was made by hand: nothing of it counts. `declared` are the
    LoRAs that it says itself."""
    spoken = _spoken(model.uses)
    lost = [
        Conflict(name_of(use.workflow), use.role, name, "")
        for use in spoken
        for name in (*_OLDEST, "scaling")
        if getattr(use.override, name) is not None
    ]
    return lost + [
        Conflict(name_of(use.workflow), use.role, "loras", "")
        for use in spoken
        if not declared >= {_lora_key(lora) for lora in use.ref.loras}
    ]


def loras(model: Shared) -> list[dict[str, Any]]:
    """What any of its workflows declares, each once, sorted so that the order says nothing."""
    found: dict[LoraKey, dict[str, Any]] = {}
    for use in model.uses:
        for lora in use.ref.loras:
            found.setdefault(_lora_key(lora), _lora(lora))
    kept = list(found)[:MAX_LORAS]  # the oldest workflows' first
    return [found[key] for key in sorted(kept)]


def _lora_key(lora: LoraDecl) -> LoraKey:
    return lora.name, lora.uri, lora.revision, lora.subfolder, lora.weight_name


def _lora(lora: LoraDecl) -> dict[str, Any]:
    source = {"uri": lora.uri, "revision": lora.revision, "subfolder": lora.subfolder}
    entry: dict[str, Any] = {"name": lora.name, "source": _told(source)}
    return entry | ({"weightName": lora.weight_name} if lora.weight_name else {})


def _spoken(uses: Sequence[Use]) -> list[Use]:
    """The newest word of each workflow and role: what an old revision said counts no more."""
    newest = {name_of(use.workflow) for use in uses if use.newest}
    return [use for use in uses if use.newest or name_of(use.workflow) not in newest]


def _losers(name: str, value: object, winner: Use, others: Iterable[Use]) -> list[Conflict]:
    """Who says something else. A workflow that says nothing loses nothing."""
    lost = [
        use
        for use in others
        if getattr(use.override, name) is not None and getattr(use.override, name) != value
    ]
    return [
        Conflict(name_of(use.workflow), use.role, name, name_of(winner.workflow), winner.role)
        for use in lost
    ]


def _scaling(uses: Sequence[Use]) -> tuple[dict[str, Any] | None, list[Conflict]]:
    """Merged bounds. Whoever says nothing wants one replica at least: zero only where all ask."""
    given = [use for use in uses if use.override.scaling is not None]
    if not given:
        return None, []
    scalings = [use.override.scaling for use in given if use.override.scaling is not None]
    least = max(s.min_replicas for s in scalings)
    if len(given) < len(uses):
        least = max(least, 1)
    most = max(least, *(s.max_replicas for s in scalings))
    first = scalings[0]
    merged = first.model_copy(update={"min_replicas": least, "max_replicas": most})
    lost: list[Conflict] = []
    for name in ("mode", "target_per_replica", "behavior"):
        lost += [
            Conflict(
                name_of(use.workflow),
                use.role,
                f"scaling.{name}",
                name_of(given[0].workflow),
                given[0].role,
            )
            for use, scaling in zip(given[1:], scalings[1:], strict=True)
            if getattr(scaling, name) != getattr(first, name)
        ]
    return _plain(merged), lost


def network(ref: ModelRef) -> dict[str, Any]:
    """What is loaded, as fields of ModelSpec; only what differs from the usual."""
    source = {
        # One spelling, whichever of its workflows is asked: an identity's source cannot change.
        "uri": canonical_uri(ref.uri),
        "revision": ref.revision,
        "subfolder": ref.subfolder,
        "variant": ref.variant,
    }
    options = ref.options
    pruning = {
        "uri": canonical_uri(options.get("pruning_uri", "")),
        "revision": options.get("pruning_revision", ""),
        "subfolder": options.get("pruning_subfolder", ""),
    }
    spec: dict[str, Any] = {
        "family": ref.family,
        "component": ref.component,
        "source": _told(source),
        "className": ref.class_name,
        "dtype": ref.dtype,
        "attentionBackend": options.get("attention_backend", ""),
        "compile": options.get("compile", ""),
        "quantization": options.get("quantization", ""),
        "tiling": options.get("tiling") == "true",
        "pruning": {"artifact": _told(pruning)} if pruning["uri"] else None,
    }
    return _told(spec)


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value}


def _plain(value: object) -> Any:
    """As JSON, defaults written out: what a field means must not change with a default."""
    if not isinstance(value, BaseModel):
        return value
    return _filled(value.model_dump(mode="json", by_alias=True, exclude_none=True))


def _filled(value: Any) -> Any:
    """Without texts, maps and lists that hold nothing."""
    if isinstance(value, list):
        return [_filled(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entries = cast("dict[str, Any]", value).items()
    return {key: _filled(item) for key, item in entries if item not in ({}, [], "")}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
