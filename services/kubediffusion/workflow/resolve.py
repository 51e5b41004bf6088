# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From a workflow as written to one that is ready for requests: sources pinned, graph checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from kubediffusion.api.identity import Arithmetic, identity
from kubediffusion.api.load import did_you_mean
from kubediffusion.api.serving import ModelOverride
from kubediffusion.api.types import Source
from kubediffusion.api.workflow import DiffusionWorkflow, Input, WorkflowSpec
from kubediffusion.errors import InvalidInput, InvalidWorkflow
from kubediffusion.workflow.bind import check_value
from kubediffusion.workflow.check import Scope, check_graph
from kubediffusion.workflow.families import FAMILIES, MAX_IMAGE, MAX_PROMPT, Family, Role
from kubediffusion.workflow.graph import Graph
from kubediffusion.workflow.presets import PRESETS
from kubediffusion.workflow.values import (
    InputSpec,
    InputType,
    LoraDecl,
    ModelRef,
    Pruning,
    ResolvedWorkflow,
    Slo,
    StepCache,
)


class Index(Protocol):
    """What a pipeline's model_index.json says, and the commit that it was read at."""

    @property
    def components(self) -> Mapping[str, str]: ...
    @property
    def commit(self) -> str: ...


def resolve(
    workflow: DiffusionWorkflow,
    index: Index,
    commits: Mapping[tuple[str, str], str] | None = None,
) -> ResolvedWorkflow:
    """Check `workflow` against its pipeline and pin its sources.

    `index` is the pipeline's; `commits` gives the resolved revision of other sources (ControlNets,
    overrides, LoRAs) by (uri, revision); one that is not there stays as written.
    Raises InvalidWorkflow.
    """
    return _Resolver(workflow, index, commits or {}).resolve()


def sources(workflow: DiffusionWorkflow) -> tuple[Source, ...]:
    """The sources besides the pipeline's, whose commits `resolve` wants to know."""
    spec = workflow.spec
    found = [c.source for c in spec.control_nets] + [x.source for x in spec.loras]
    for override in spec.models.values():
        found += [override.source] if override.source else []
        found += [override.pruning.artifact] if override.pruning else []
    return tuple(found)


class _Resolver:
    def __init__(
        self, workflow: DiffusionWorkflow, index: Index, commits: Mapping[tuple[str, str], str]
    ) -> None:
        self._name = workflow.metadata.name
        self._spec: WorkflowSpec = workflow.spec
        self._index = index
        self._commits = commits
        pipeline = workflow.spec.pipeline
        self._preset = PRESETS[pipeline.preset] if pipeline.preset else None
        family = self._preset.family if self._preset else pipeline.family
        assert family is not None, "the API's rules ask for a preset or a family"
        self._family: Family = FAMILIES[family]
        self._controlnets = [c.name for c in self._spec.control_nets]

    def resolve(self) -> ResolvedWorkflow:
        spec = self._spec
        loras = {x.name: self._lora(index) for index, x in enumerate(spec.loras)}
        models = self._models(tuple(loras.values()))
        roles = frozenset(models)
        declared = self._inputs(roles)
        graph = self._graph(roles, declared)
        inputs = self._narrowed(declared, graph)
        used = {node.role for node in graph.nodes}
        used |= {role for role in models if role.startswith("controlnet.")}
        return ResolvedWorkflow(
            name=self._name,
            family=self._family.name,
            models={role: ref for role, ref in models.items() if role in used},
            graph=graph,
            inputs=inputs,
            loras=loras,
            slo=self._slo(),
            numerics=spec.numerics,
            pruning=self._pruning(),
            step_cache=self._step_cache(),
        )

    def _slo(self) -> Slo:
        slo = self._spec.slo
        if slo is None:
            return Slo()
        return Slo(
            float(slo.latency_scale) if slo.latency_scale else None,
            float(slo.deadline_seconds) if slo.deadline_seconds else None,
            float(slo.activation_timeout_seconds),
        )

    def _pruning(self) -> Pruning | None:
        given = self._spec.models.get("transformer", ModelOverride()).pruning
        if given is None:
            return None
        return Pruning(
            float(given.budget), float(given.min_budget or 0), float(given.max_budget or 1)
        )

    def _step_cache(self) -> StepCache | None:
        given = self._spec.caching.steps if self._spec.caching else None
        if given is None:
            return None
        if given.method not in self._family.step_caches:
            offered = " or ".join(self._family.step_caches) or "none"
            message = f"the {self._family.name} family's step cache is {offered}; use that"
            raise InvalidWorkflow(message, field="spec.caching.steps.method")
        if self._spec.numerics == "exact":
            message = (
                "a step that is left out is not diffusers' step, which numerics: exact promises "
                "to equal; set numerics: fast, or remove this"
            )
            raise InvalidWorkflow(message, field="spec.caching.steps")
        return StepCache(
            given.method,
            float(given.threshold),
            tuple(float(ratio) for ratio in given.ratios),
            given.max_skip_steps,
            float(given.retention),
        )

    def _commit(self, source: Source) -> str:
        return self._commits.get((source.uri, source.revision), source.revision)

    def _lora(self, index: int) -> LoraDecl:
        lora = self._spec.loras[index]
        return LoraDecl(
            lora.name,
            lora.source.uri,
            self._commit(lora.source),
            lora.source.subfolder,
            lora.weight_name,
            float(lora.scale),
        )

    # ---- models

    def _models(self, loras: tuple[LoraDecl, ...]) -> dict[str, ModelRef]:
        self._check_overrides()
        models: dict[str, ModelRef] = {}
        for name, role in self._family.roles.items():
            class_name = self._index.components.get(name)
            if not class_name and role.required:
                message = f"the pipeline has no {name}, which {self._family.name} needs"
                raise InvalidWorkflow(message, field="spec.pipeline.source")
            override = self._spec.models.get(name, ModelOverride())
            if not class_name or not override.enabled:
                continue
            if class_name not in role.classes:
                message = (
                    f"the pipeline's {name} is a {class_name}; "
                    f"{self._family.name} takes {' or '.join(role.classes)}"
                )
                raise InvalidWorkflow(message, field="spec.pipeline.source")
            models[name] = self._ref(name, role, class_name, loras)
        for controlnet in self._spec.control_nets:
            role = self._family.controlnet
            name = f"controlnet.{controlnet.name}"
            models[name] = self._ref(name, role, role.classes[0], (), controlnet.source)
        return models

    def _check_overrides(self) -> None:
        optional = {f"controlnet.{name}": self._family.controlnet for name in self._controlnets}
        roles = {**self._family.roles, **optional}
        for name, override in self._spec.models.items():
            path = f"spec.models.{name}"
            if name not in roles:
                hint = did_you_mean(name, roles)
                raise InvalidWorkflow(f"the workflow has no model {name!r}; {hint}", field=path)
            if not override.enabled and (roles[name].required or name in optional):
                message = "cannot be left out; only an optional model can"
                raise InvalidWorkflow(message, field=f"{path}.enabled")
            for option in ("attention_backend", "quantization", "tiling", "pruning"):
                given = getattr(override, option)
                if given not in (None, "", False) and option not in roles[name].options:
                    field = ModelOverride.model_fields[option].alias or option
                    message = f"the {self._family.name} family's {name} cannot do that; remove it"
                    raise InvalidWorkflow(message, field=f"{path}.{field}")
            self._check_compile(override.compile, roles[name], name)

    def _check_compile(self, mode: str, role: Role, name: str) -> None:
        if mode == "none":
            return
        field = f"spec.models.{name}.compile"
        if mode not in role.compile:
            offered = ", ".join(("none", *role.compile))
            message = f"the {self._family.name} family's {name} offers {offered}; use one of these"
            raise InvalidWorkflow(message, field=field)
        if self._spec.numerics == "exact":
            message = (
                "compiled code rounds otherwise than diffusers, which numerics: exact promises "
                "to equal; set numerics: fast, or remove this"
            )
            raise InvalidWorkflow(message, field=field)

    def _ref(
        self,
        name: str,
        role: Role,
        class_name: str,
        loras: tuple[LoraDecl, ...],
        source: Source | None = None,
    ) -> ModelRef:
        override = self._spec.models.get(name, ModelOverride())
        pipeline = self._spec.pipeline
        source = override.source or source
        if source is None:
            # The component's own folder inside the pipeline.
            source = pipeline.source.model_copy(update={"subfolder": role.component})
            revision = self._index.commit or source.revision
        else:
            revision = self._commit(source)
        pruning = override.pruning.artifact if override.pruning else None
        arithmetic = Arithmetic(
            family=self._family.name,
            component=role.component,
            uri=source.uri,
            revision=revision,
            subfolder=source.subfolder,
            variant=source.variant,
            class_name=class_name,
            dtype=self._dtype(name),
            quantization=override.quantization,
            attention_backend=override.attention_backend,
            compile=override.compile,
            tiling=override.tiling,
            pruning_uri=pruning.uri if pruning else "",
            pruning_revision=self._commit(pruning) if pruning else "",
            pruning_subfolder=pruning.subfolder if pruning else "",
        )
        return ModelRef(
            role=name,
            identity=identity(arithmetic),
            family=arithmetic.family,
            component=arithmetic.component,
            uri=arithmetic.uri,
            revision=arithmetic.revision,
            subfolder=arithmetic.subfolder,
            variant=arithmetic.variant,
            dtype=arithmetic.dtype,
            class_name=class_name,
            options=_options(arithmetic),
            loras=loras if role.loras else (),
        )

    def _dtype(self, role: str) -> str:
        """Its own or the pipeline's; a ControlNet's is its denoiser's, whose steps it is in."""

        def of(name: str) -> str:
            given = self._spec.models.get(name)
            return (given.dtype if given else None) or self._spec.pipeline.dtype

        if not role.startswith("controlnet."):
            return of(role)
        [denoiser] = (n for n, stages in self._family.stages.items() if "denoise" in stages)
        override = self._spec.models.get(role)
        if override and override.dtype not in (None, of(denoiser)):
            message = f"a ControlNet runs in its {denoiser}'s dtype, {of(denoiser)}; leave it out"
            raise InvalidWorkflow(message, field=f"spec.models.{role}.dtype")
        return of(denoiser)

    # ---- inputs and graph

    def _inputs(self, roles: frozenset[str]) -> dict[str, InputSpec]:
        """The preset's inputs with the workflow's changes, or the workflow's own."""
        known: dict[str, InputSpec] = {}
        if self._preset:
            specs = self._preset.inputs(roles, self._controlnets)
            known = {spec.name: spec for spec in specs}
        for name, given in self._spec.inputs.items():
            path = f"spec.inputs.{name}"
            base = known.get(name)
            if base is None and self._preset:
                hint = did_you_mean(name, known)
                raise InvalidWorkflow(f"the preset has no input {name!r}; {hint}", field=path)
            if base is None and given.type is None:
                message = "is required: text, integer, number, flag or image"
                raise InvalidWorkflow(message, field=f"{path}.type")
            if base is not None and given.type not in (None, base.type):
                message = f"is {base.type} in the preset; leave it out"
                raise InvalidWorkflow(message, field=f"{path}.type")
            base = base or InputSpec(name, InputType(given.type or "text"))
            known[name] = _changed(base, given)
        for name, spec in known.items():
            if spec.requires and spec.requires not in known:
                hint = did_you_mean(spec.requires, known)
                message = f"there is no input {spec.requires!r}; {hint}"
                raise InvalidWorkflow(message, field=f"spec.inputs.{name}.requires")
        return known

    def _graph(self, roles: frozenset[str], inputs: Mapping[str, InputSpec]) -> Graph:
        spec = self._spec.graph
        if self._preset:
            spec = self._preset.graph(roles, self._controlnets)
        assert spec is not None, "the API's rules ask for a preset or a graph"
        scope = Scope(
            self._family,
            roles,
            self._controlnets,
            inputs,
            all_inputs_read=self._preset is None,
        )
        return check_graph(spec, scope)

    def _narrowed(self, inputs: Mapping[str, InputSpec], graph: Graph) -> dict[str, InputSpec]:
        """Inputs with the bounds of the ports that they feed, and defaults that keep to them."""
        narrowed: dict[str, InputSpec] = {}
        for name, spec in inputs.items():
            low, high = graph.bounds.get(name, (None, None))
            lows = [x for x in (spec.minimum, low) if x is not None]
            highs = [x for x in (spec.maximum, high) if x is not None]
            ceiling = {InputType.TEXT: MAX_PROMPT, InputType.IMAGE: MAX_IMAGE}.get(spec.type)
            lengths = [x for x in (spec.max_length, ceiling) if x is not None]
            spec = replace(
                spec,
                minimum=max(lows, default=None),
                maximum=min(highs, default=None),
                max_length=min(lengths, default=None),
            )
            if lows and highs and max(lows) > min(highs):
                message = f"nothing lies in {max(lows):g} to {min(highs):g}"
                raise InvalidWorkflow(message, field=f"spec.inputs.{name}")
            if spec.default is not None:
                try:
                    spec = replace(spec, default=check_value(spec, spec.default))
                except InvalidInput as error:
                    path = f"spec.inputs.{name}.default"
                    raise InvalidWorkflow(error.message, field=path) from None
            narrowed[name] = spec
        return narrowed


def _options(arithmetic: Arithmetic) -> dict[str, str]:
    """What the family's code has to do beyond loading; only what differs from the usual."""
    options = {
        "quantization": arithmetic.quantization,
        "attention_backend": arithmetic.attention_backend,
        "compile": "" if arithmetic.compile == "none" else arithmetic.compile,
        "tiling": "true" if arithmetic.tiling else "",
        "pruning_uri": arithmetic.pruning_uri,
        "pruning_revision": arithmetic.pruning_revision,
        "pruning_subfolder": arithmetic.pruning_subfolder,
    }
    return {key: value for key, value in options.items() if value}


def _changed(base: InputSpec, given: Input) -> InputSpec:
    """The tighter of two bounds; the given default."""
    lows = [x for x in (base.minimum, given.minimum) if x is not None]
    highs = [x for x in (base.maximum, given.maximum) if x is not None]
    lengths = [x for x in (base.max_length, given.max_length) if x is not None]
    multiples = [x for x in (base.multiple_of, given.multiple_of) if x is not None]
    changed = replace(
        base,
        minimum=max(lows, default=None),
        maximum=min(highs, default=None),
        max_length=min(lengths, default=None),
        multiple_of=math.lcm(*multiples) if multiples else None,
        required=base.required if given.required is None else given.required,
        requires=given.requires or base.requires,
        description=given.description or base.description,
    )
    default: object = given.default
    if default is None:
        return changed
    if isinstance(default, str) and default.startswith("="):
        return replace(changed, default=None, default_expression=default[1:].strip())
    path = f"spec.inputs.{base.name}.default"
    if not isinstance(default, (str, int, float, bool)) or base.type is InputType.IMAGE:
        raise InvalidWorkflow(f"cannot be the default of an input of type {base.type}", field=path)
    return replace(changed, default=default, default_expression="")
