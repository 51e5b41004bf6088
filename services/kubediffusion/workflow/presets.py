# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Graphs and inputs that need not be written out. A preset says them in the workflow's own words,
and they are checked as a graph in a file is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kubediffusion.api.workflow import Graph, GraphNode
from kubediffusion.workflow.families import MAX_PROMPT
from kubediffusion.workflow.values import InputSpec, InputType, Value


@dataclass(frozen=True)
class Preset:
    """`inputs` and `graph` take the roles that are there and the names of the ControlNets."""

    name: str
    family: str
    inputs: Callable[[frozenset[str], Sequence[str]], tuple[InputSpec, ...]]
    graph: Callable[[frozenset[str], Sequence[str]], Graph]


def _text(name: str, description: str, required: bool = False, default: str | None = None):
    return InputSpec(
        name, InputType.TEXT, required, default, max_length=MAX_PROMPT, description=description
    )


def _sd3_inputs(roles: frozenset[str], controlnets: Sequence[str]) -> tuple[InputSpec, ...]:
    size = "$facts.transformer.sample_size * $facts.vae.vae_scale_factor"
    integer, number, image = InputType.INTEGER, InputType.NUMBER, InputType.IMAGE
    inputs = [
        _text("prompt", "What to draw.", required=True),
        _text("negative_prompt", "What to keep away from; with guidance above 1.", default=""),
        InputSpec(
            "width", integer, default_expression=size, description="Of the picture, in pixels."
        ),
        InputSpec(
            "height", integer, default_expression=size, description="Of the picture, in pixels."
        ),
        InputSpec("steps", integer, default=28, description="Denoising steps."),
        InputSpec(
            "guidance",
            number,
            default=7.0,
            description="Classifier-free guidance scale; 1 and less: none, half the work.",
        ),
        InputSpec("seed", integer, description="Of the random numbers; derived where not given."),
        InputSpec(
            "max_sequence_length", integer, default=256, description="Tokens for the T5 encoder."
        ),
        InputSpec("image", image, description="Picture to start from: image to image."),
        InputSpec(
            "strength",
            number,
            default=0.6,
            requires="image",
            description="How far to go from the picture: 0 nowhere, 1 all the way.",
        ),
    ]
    encoders = [number for number in (2, 3) if _encoder(number) in roles]
    for number_ in encoders:
        inputs.append(_text(f"prompt_{number_}", f"Other words for text encoder {number_}."))
        inputs.append(
            _text(f"negative_prompt_{number_}", f"Other words for text encoder {number_}.")
        )
    for name in controlnets:
        control = f"control.{name}"
        inputs += [
            InputSpec(control, image, description=f"Control image of ControlNet {name}."),
            *(
                InputSpec(
                    f"{control}.{key}",
                    number,
                    default=default,
                    requires=control,
                    description=description,
                )
                for key, default, description in (
                    ("scale", 1.0, "How strongly it steers."),
                    ("start", 0.0, "Share of the steps after which it begins."),
                    ("end", 1.0, "Share of the steps after which it ends."),
                )
            ),
        ]
    return tuple(inputs)


def _encoder(number: int) -> str:
    return "text_encoder" if number == 1 else f"text_encoder_{number}"


def _sd3_graph(roles: frozenset[str], controlnets: Sequence[str]) -> Graph:
    encoders = [number for number in (1, 2, 3) if _encoder(number) in roles]
    nodes = [_sd3_encode("prompt", number) for number in encoders]
    nodes += [_sd3_encode("negative", number) for number in encoders]
    nodes.append(
        GraphNode(
            name="init",
            model="vae",
            stage="encode_image",
            when="$inputs.image",
            inputs={
                "image": "$inputs.image",
                "width": "$inputs.width",
                "height": "$inputs.height",
                "mode": "init",
                "seed": "$inputs.seed",
                "strength": "$inputs.strength",
            },
        )
    )
    nodes += [_sd3_control(index, controlnets) for index in range(len(controlnets))]
    nodes.append(_sd3_denoise(encoders, controlnets))
    nodes.append(
        GraphNode(name="decode", model="vae", stage="decode", inputs={"latents": "denoise.latents"})
    )
    return Graph(nodes=tuple(nodes), output="decode.image")


def _sd3_encode(branch: str, number: int) -> GraphNode:
    plain = "prompt" if branch == "prompt" else "negative_prompt"
    text: Value | list[str] = f"$inputs.{plain}"
    if number > 1:
        text = [f"$inputs.{plain}_{number}", f"$inputs.{plain}"]
    inputs: dict[str, object] = {"text": text}
    if number == 3:
        inputs["max_length"] = "$inputs.max_sequence_length"
    return GraphNode(
        name=f"{branch}_{number}",
        model=_encoder(number),
        stage="encode",
        inputs=inputs,
        when="$inputs.guidance > 1" if branch == "negative" else None,
    )


def _sd3_control(index: int, controlnets: Sequence[str]) -> GraphNode:
    """Control images are encoded one after the other: each hands its random numbers on."""
    name = controlnets[index]
    earlier = controlnets[:index]
    inputs: dict[str, object] = {
        "image": f"$inputs.control.{name}",
        "width": "$inputs.width",
        "height": "$inputs.height",
        "mode": "control",
        "branches": "= 2 if $inputs.guidance > 1 else 1",
        "shift": "= " + _sd3_shift(controlnets),
        "seed": "$inputs.seed",
    }
    if earlier:
        inputs["generator"] = [f"control.{other}.generator" for other in reversed(earlier)]
    return GraphNode(
        name=f"control.{name}",
        model="vae",
        stage="encode_image",
        inputs=inputs,
        when=f"$inputs.control.{name}",
    )


def _sd3_shift(controlnets: Sequence[str]) -> str:
    """Of several ControlNets, diffusers asks the first of those in use for all."""
    fact = "not $facts.controlnet.{}.force_zeros_for_pooled_projection"
    text = fact.format(controlnets[-1])
    for name in reversed(controlnets[:-1]):
        text = f"{fact.format(name)} if $inputs.control.{name} else ({text})"
    return text


def _sd3_denoise(encoders: Sequence[int], controlnets: Sequence[str]) -> GraphNode:
    inputs: dict[str, object] = {}
    for branch in ("prompt", "negative"):
        for number in encoders:
            for output in ("embeds", "pooled") if number < 3 else ("embeds",):
                port = f"{branch}_{number}.{output}"
                inputs[port] = port
    for name in ("max_sequence_length", "width", "height", "seed", "steps", "guidance"):
        inputs[name] = f"$inputs.{name}"
    inputs["strength"] = "$inputs.strength"
    inputs["init.latents"] = "init.latents"
    inputs["init.generator"] = "init.generator"
    for name in controlnets:
        control = f"control.{name}"
        inputs[f"{control}.latents"] = f"{control}.latents"
        for key in ("scale", "start", "end"):
            inputs[f"{control}.{key}"] = f"$inputs.{control}.{key}"
    return GraphNode(name="denoise", model="transformer", stage="denoise", inputs=inputs)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {"StableDiffusion3": Preset("StableDiffusion3", "sd3", _sd3_inputs, _sd3_graph)}
)
