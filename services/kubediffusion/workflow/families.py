# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What each family of models offers a graph: roles, stages, and the types of their ports.

A new family is an entry of `FAMILIES`; a new preset over it an entry of `presets.PRESETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from kubediffusion.errors import InvalidInput
from kubediffusion.workflow.expression import Fact
from kubediffusion.workflow.values import SEED_LIMIT, Facts, InputType, Value

MAX_STEPS = 1000
MAX_SIDE = 16384
MAX_PROMPT = 10_000  # characters
MAX_IMAGE = 32 << 20  # bytes


@dataclass(frozen=True)
class PortType:
    """A request's value (`value`), or what one stage makes for another (`tensor`)."""

    value: InputType | None = None
    tensor: str = ""

    def __str__(self) -> str:
        return self.value.value if self.value else f"tensor[{self.tensor}]"


@dataclass(frozen=True)
class Port:
    """An input of a stage. Bounds hold for every request, whatever the workflow allows."""

    type: PortType
    required: bool = True
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Signature:
    """The ports of one stage of one role."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, PortType]


@dataclass(frozen=True)
class Role:
    """A model's place in its pipeline."""

    component: str
    required: bool = True
    classes: tuple[str, ...] = ()
    # Whether a request's LoRAs can change this model.
    loras: bool = False
    # Fields of a model override, beyond how it is served, that the family's code carries out.
    options: frozenset[str] = frozenset()
    # Modes of torch.compile that it offers besides none.
    compile: tuple[str, ...] = ()


Bind = Mapping[str, str]  # port of the denoiser -> name of the input that feeds it


@dataclass(frozen=True)
class Family:
    """One architecture family."""

    name: str
    roles: Mapping[str, Role]
    controlnet: Role
    # (role, stage, names of the ControlNets) -> signature; None where the role has no such stage.
    signature: Callable[[str, str, Sequence[str]], Signature | None]
    stages: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Fact] = field(default_factory=dict[str, Fact])
    # Methods of step caches that its denoiser can have.
    step_caches: tuple[str, ...] = ()
    # Checks of a request that need the models' facts. Arguments: values by port of the denoiser,
    # names of their inputs, facts. Raises InvalidInput.
    check: Callable[[Mapping[str, Value], Bind, Facts], None] = lambda values, names, facts: None


def _value(kind: InputType, **bounds: float | bool | tuple[str, ...]) -> Port:
    return Port(PortType(kind), **bounds)  # pyright: ignore[reportArgumentType]


def _tensor(kind: str, required: bool = True) -> Port:
    return Port(PortType(tensor=kind), required)


_TEXT = _value(InputType.TEXT)
_SIDE = _value(InputType.INTEGER, minimum=1, maximum=MAX_SIDE)
_SEED = _value(InputType.INTEGER, minimum=0, maximum=SEED_LIMIT - 1)
_STRENGTH = _value(InputType.NUMBER, required=False, minimum=0, maximum=1)
_SHARE = _value(InputType.NUMBER, required=False, minimum=0, maximum=1)
_SCALE = _value(InputType.NUMBER, required=False, minimum=-10, maximum=10)

# ---------------------------------------------------------------- Stable Diffusion 3 and 3.5

_SD3_LENGTH = _value(InputType.INTEGER, minimum=1, maximum=512)  # as diffusers' pipeline
_SD3_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def _sd3_signature(role: str, stage: str, controlnets: Sequence[str]) -> Signature | None:
    match role, stage:
        case (("text_encoder" | "text_encoder_2"), "encode"):
            outputs = {
                "embeds": PortType(tensor=f"{role}.embeds"),
                "pooled": PortType(tensor=f"{role}.pooled"),
            }
            return Signature({"text": _TEXT}, outputs)
        case "text_encoder_3", "encode":
            return Signature(
                {"text": _TEXT, "max_length": _SD3_LENGTH},
                {"embeds": PortType(tensor="text_encoder_3.embeds")},
            )
        case "vae", "encode_image":
            return _SD3_ENCODE_IMAGE
        case "vae", "decode":
            return Signature({"latents": _tensor("latents")}, {"image": PortType(tensor="pixels")})
        case "transformer", "denoise":
            return _sd3_denoise(controlnets)
        case _:
            return None


_SD3_ENCODE_IMAGE = Signature(
    {
        "image": _value(InputType.IMAGE),
        "width": _SIDE,
        "height": _SIDE,
        "mode": _value(InputType.TEXT, choices=("init", "control")),
        "seed": _SEED,
        "strength": _STRENGTH,
        "branches": _value(InputType.INTEGER, required=False, minimum=1, maximum=2),
        "shift": _value(InputType.FLAG, required=False),
        "generator": _tensor("generator", required=False),
    },
    {"latents": PortType(tensor="latents"), "generator": PortType(tensor="generator")},
)


def _sd3_denoise(controlnets: Sequence[str]) -> Signature:
    ports: dict[str, Port] = {}
    for branch, required in (("prompt", True), ("negative", False)):
        for number, role in enumerate(_SD3_ENCODERS, start=1):
            needed = required and number < 3
            ports[f"{branch}_{number}.embeds"] = _tensor(f"{role}.embeds", needed)
            if number < 3:
                ports[f"{branch}_{number}.pooled"] = _tensor(f"{role}.pooled", needed)
    ports |= {
        "max_sequence_length": _SD3_LENGTH,
        "width": _SIDE,
        "height": _SIDE,
        "seed": _SEED,
        "steps": _value(InputType.INTEGER, minimum=1, maximum=MAX_STEPS),
        "guidance": _value(InputType.NUMBER, minimum=0, maximum=100),
        "strength": _STRENGTH,
        "init.latents": _tensor("latents", required=False),
        "init.generator": _tensor("generator", required=False),
    }
    for name in controlnets:
        ports[f"control.{name}.latents"] = _tensor("latents", required=False)
        ports[f"control.{name}.scale"] = _SCALE
        ports[f"control.{name}.start"] = _SHARE
        ports[f"control.{name}.end"] = _SHARE
    return Signature(ports, {"latents": PortType(tensor="latents")})


def _sd3_check(values: Mapping[str, Value], names: Bind, facts: Facts) -> None:
    _check_strength(values, names)
    _check_controls(values, names)
    transformer, vae = facts.get("transformer", {}), facts.get("vae", {})
    patch, scale = transformer.get("patch_size"), vae.get("vae_scale_factor")
    if not isinstance(patch, int) or not isinstance(scale, int):
        return
    unit = patch * scale
    table = transformer.get("pos_embed_max_size")
    largest = table * unit if isinstance(table, int) else MAX_SIDE // unit * unit
    for port in ("width", "height"):
        side = values.get(port)
        if not isinstance(side, int):
            continue
        field = f"inputs.{names[port]}"
        if side > largest:
            raise InvalidInput(
                f"{side} is more than this model can draw; at most {largest}", field=field
            )
        if side % unit:
            nearest = min(max(unit, round(side / unit) * unit), largest)
            raise InvalidInput(
                f"{side} is not a multiple of {unit}; {nearest} is the nearest", field=field
            )


SD3 = Family(
    name="sd3",
    roles=MappingProxyType(
        {
            "text_encoder": Role("text_encoder", True, ("CLIPTextModelWithProjection",), True),
            "text_encoder_2": Role("text_encoder_2", True, ("CLIPTextModelWithProjection",), True),
            "text_encoder_3": Role("text_encoder_3", False, ("T5EncoderModel",)),
            "transformer": Role(
                "transformer",
                True,
                ("SD3Transformer2DModel",),
                True,
                frozenset({"pruning"}),
                ("default",),
            ),
            "vae": Role("vae", True, ("AutoencoderKL",)),
        }
    ),
    controlnet=Role("controlnet", False, ("SD3ControlNetModel",)),
    signature=_sd3_signature,
    stages=MappingProxyType(
        {
            "text_encoder": ("encode",),
            "text_encoder_2": ("encode",),
            "text_encoder_3": ("encode",),
            "transformer": ("denoise",),
            "vae": ("encode_image", "decode"),
        }
    ),
    facts=MappingProxyType(
        {
            "vae_scale_factor": Fact(InputType.INTEGER),
            "latent_channels": Fact(InputType.INTEGER),
            "patch_size": Fact(InputType.INTEGER),
            "sample_size": Fact(InputType.INTEGER),
            "in_channels": Fact(InputType.INTEGER),
            "pos_embed_max_size": Fact(InputType.INTEGER),
            "joint_attention_dim": Fact(InputType.INTEGER),
            "max_length": Fact(InputType.INTEGER),
            "force_zeros_for_pooled_projection": Fact(InputType.FLAG),
        }
    ),
    check=_sd3_check,
    # Not first-block: it reuses text too, and the last block of SD3 gives none out.
    step_caches=("magcache",),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({SD3.name: SD3})


def steps_to_run(steps: int, strength: float | None) -> int:
    """Denoising steps of an image-to-image request, counted as diffusers counts them.

    ``steps - int(max(steps - min(steps * strength, steps), 0))``; all of them without an image.
    """
    if strength is None:
        return steps
    return steps - int(max(steps - min(steps * strength, steps), 0))


def _check_strength(values: Mapping[str, Value], names: Bind) -> None:
    steps, strength = values.get("steps"), values.get("strength")
    if not isinstance(steps, int) or not isinstance(strength, float):
        return
    if steps_to_run(steps, strength) < 1:
        raise InvalidInput(
            f"strength {strength:g} of {steps} steps leaves no step to run; raise one of them",
            field=f"inputs.{names['strength']}",
        )


def _check_controls(values: Mapping[str, Value], names: Bind) -> None:
    for port, start in values.items():
        if not port.endswith(".start") or not isinstance(start, float):
            continue
        end_port = port.removesuffix(".start") + ".end"
        end = values.get(end_port)
        if isinstance(end, float) and start >= end:
            raise InvalidInput(
                f"a ControlNet begins before it ends: {start:g} is not below "
                f"{names[end_port]} = {end:g}",
                field=f"inputs.{names[port]}",
            )
