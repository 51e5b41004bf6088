# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""LoRAs are switched from request to request, and nobody else's bits change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from kubediffusion import models
from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import LoadSpec, Lora
from kubediffusion.models.lora import Adapters
from kubediffusion.models.text import ClipEncoder

SpecOf = Callable[..., LoadSpec]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def clip(pristine: Path, spec_of: SpecOf) -> ClipEncoder:
    model = models.load(spec_of(pristine, "text_encoder"))
    assert isinstance(model, ClipEncoder)
    return model


def encode(clip: ClipEncoder, *loras: Lora) -> torch.Tensor:
    embeds = clip.run("encode", {"text": "a red circle"}, loras)["embeds"]
    assert isinstance(embeds, torch.Tensor)
    return embeds


def limited(clip: ClipEncoder, limit: int) -> ClipEncoder:
    clip._adapters = Adapters(clip._module, "text_encoder", limit)
    return clip


def made(folder: Path, pristine: Path, factor: float, **metadata: Any) -> Path:
    """The pipeline's first LoRA, `factor` as strong."""
    folder.mkdir(parents=True)
    tensors = load_file(pristine / "lora_0" / FILE)
    tensors = {n: t * factor if "lora_B" in n or "up" in n else t for n, t in tensors.items()}
    save_file(tensors, folder / FILE, {"format": "pt"} | metadata)
    return folder


def test_a_lora_changes_its_request_and_no_other(pristine: Path, clip: ClipEncoder) -> None:
    plain = encode(clip)
    weak, strong = (Lora("ink", pristine / "lora_0", scale) for scale in (0.3, 1.0))
    results = [encode(clip, weak), encode(clip, strong)]
    assert not torch.equal(results[0], results[1])
    for _ in range(2):
        assert torch.equal(encode(clip), plain)
        assert torch.equal(encode(clip, weak), results[0])
        assert torch.equal(encode(clip, strong), results[1])


def test_a_lora_with_nothing_for_this_network_changes_nothing(
    pristine: Path, clip: ClipEncoder
) -> None:
    assert torch.equal(encode(clip, Lora("other", pristine / "lora_1", 1.0)), encode(clip))


def test_one_name_for_two_files_means_two_loras(
    pristine: Path, tmp_path: Path, clip: ClipEncoder
) -> None:
    first = Lora("ink", made(tmp_path / "a", pristine, 1.0), 1.0)
    second = Lora("ink", made(tmp_path / "b", pristine, 2.0), 1.0)
    a, b = encode(clip, first), encode(clip, second)
    assert not torch.equal(a, b)
    assert torch.equal(encode(clip, first), a)


def test_one_file_under_two_names_counts_twice(pristine: Path, clip: ClipEncoder) -> None:
    path = pristine / "lora_0"
    twice = encode(clip, Lora("a", path, 0.25), Lora("b", path, 0.5))
    once = encode(clip, Lora("a", path, 0.75))
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)
    assert torch.equal(encode(clip, Lora("a", path, 0.25), Lora("b", path, 0.5)), twice)


def test_beyond_the_limit_the_least_used_goes_and_comes_back_with_equal_bits(
    pristine: Path, tmp_path: Path, clip: ClipEncoder
) -> None:
    limited(clip, 2)
    plain = encode(clip)
    loras = [Lora(f"l{i}", made(tmp_path / str(i), pristine, 1.0 + i), 0.5) for i in range(4)]
    size = clip.nbytes
    first = [encode(clip, lora) for lora in loras]
    one = (clip.nbytes - size) // 2
    for lora, expected in zip(reversed(loras), reversed(first), strict=True):
        assert torch.equal(encode(clip, lora), expected)
        assert torch.equal(encode(clip), plain)
        assert clip.nbytes == size + 2 * one
    with pytest.raises(InvalidInput) as failure:
        encode(clip, *loras[:3])
    assert failure.value.field == "loras"
    assert torch.equal(encode(clip, *loras[:2]), encode(clip, *loras[:2]))


def test_many_switches_leave_nothing_behind(
    pristine: Path, tmp_path: Path, clip: ClipEncoder
) -> None:
    limited(clip, 1)
    loras = [Lora(f"l{i}", made(tmp_path / str(i), pristine, 1.0 + i), 0.5) for i in range(2)]
    for lora in loras:
        encode(clip, lora)

    def held() -> tuple[int, ...]:
        module = clip._module
        return (
            clip.nbytes,
            len(list(module.modules())),
            len(list(module.named_parameters())),
            len(module.peft_config),
        )

    before = held()
    for i in range(10):
        encode(clip, loras[i % 2])
        encode(clip)
    encode(clip, loras[1])
    assert held() == before


def test_alpha_written_beside_the_weights_counts_as_in_diffusers(
    pristine: Path, tmp_path: Path, clip: ClipEncoder
) -> None:
    layers = ["q_proj", "v_proj", "out_proj"]
    config = {"r": 4, "lora_alpha": 12, "target_modules": layers}
    config = {f"text_encoder.{name}": value for name, value in config.items()}
    folder = made(tmp_path / "a", pristine, 1.0, lora_adapter_metadata=json.dumps(config))
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        pristine, transformer=None, vae=None, text_encoder_2=None, text_encoder_3=None
    )
    state, metadata = pipeline.lora_state_dict(folder, return_lora_metadata=True)
    pipeline.load_lora_into_text_encoder(
        state, None, pipeline.text_encoder, prefix="text_encoder", metadata=metadata
    )
    ids = clip._tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = pipeline.text_encoder(ids, output_hidden_states=True)
    assert torch.equal(encode(clip, Lora("ink", folder, 1.0)), out.hidden_states[-2])
    without = encode(clip, Lora("ink", pristine / "lora_0", 1.0))
    assert not torch.equal(without, out.hidden_states[-2])


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    own = [name for name in tensors if name.startswith("text_encoder.")]
    match how:
        case "other shapes":
            return tensors | {name: torch.zeros(7, 7) for name in own}
        case "one other shape":
            return tensors | {own[-1]: torch.zeros(7, 7)}
        case "layers that are not there":
            return {n.replace("layers.0", "layers.90"): t for n, t in tensors.items()}
        case "a layer too many":
            more = {n.replace("layers.0", "layers.90"): t.clone() for n, t in tensors.items()}
            return tensors | more
        case "a UNet's":
            return {f"unet.{n}": t for n, t in tensors.items()}
        case "no LoRA":
            return {"text_encoder.weight": torch.zeros(2, 2)}
        case _:
            return {}


@pytest.mark.parametrize(
    "how",
    [
        "other shapes",
        "one other shape",
        "layers that are not there",
        "a layer too many",
        "a UNet's",
        "no LoRA",
        "nothing",
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["after another", "as the first"])
def test_a_lora_that_does_not_fit_is_refused_and_leaves_all_bits_as_they_were(
    pristine: Path, tmp_path: Path, clip: ClipEncoder, how: str, before: bool
) -> None:
    good = Lora("good", pristine / "lora_0", 0.5)
    plain = encode(clip)
    inked = encode(clip, good) if before else None
    tensors = broken(load_file(pristine / "lora_0" / FILE), how)
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / FILE, {"format": "pt"})
    size = clip.nbytes
    for _ in range(2):
        with pytest.raises(UnsupportedModel) as failure:
            encode(clip, Lora("bad", tmp_path / "bad", 1.0))
        assert failure.value.field == "loras.bad"
        assert failure.value.reason == "WrongArchitecture"
        assert clip.nbytes == size
        assert torch.equal(encode(clip), plain)
    assert inked is None or torch.equal(encode(clip, good), inked)


@pytest.mark.parametrize(
    ("name", "data", "weight_name", "reason"),
    [
        ("ink.bin", b"cposix\nsystem\n", "", "NotSafetensors"),
        ("ink.bin", b"cposix\nsystem\n", "ink.bin", "NotSafetensors"),
        (FILE, b"cposix\nsystem\n", "", "BadWeights"),
        (FILE, b"", "", "BadWeights"),
        (FILE, b"", "other.safetensors", "NotSafetensors"),
    ],
)
def test_a_file_that_is_no_whole_safetensors_is_refused(
    tmp_path: Path, clip: ClipEncoder, name: str, data: bytes, weight_name: str, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnsupportedModel) as failure:
        encode(clip, Lora("ink", tmp_path, 1.0, weight_name))
    assert (failure.value.reason, failure.value.field) == (reason, "loras.ink")
    with pytest.raises(UnsupportedModel):
        encode(clip, Lora("ink", tmp_path / name, 1.0))


def test_of_several_files_one_must_be_named(
    pristine: Path, tmp_path: Path, clip: ClipEncoder
) -> None:
    folder = made(tmp_path / "two", pristine, 1.0)
    save_file(load_file(folder / FILE), folder / "second.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"second\.safetensors.*weightName"):
        encode(clip, Lora("ink", folder, 1.0))
    one = encode(clip, Lora("ink", folder, 1.0, "second.safetensors"))
    assert torch.equal(one, encode(clip, Lora("ink", folder / FILE, 1.0)))


def test_a_transformer_takes_all_of_a_lora_or_nothing(
    pristine: Path, tmp_path: Path, spec_of: SpecOf
) -> None:
    model: Any = models.load(spec_of(pristine, "transformer", dtype="bfloat16"))
    adapters, size = model._adapters, model.nbytes
    tensors = load_file(pristine / "lora_1" / FILE)
    tensors |= {n.replace("blocks.0", "blocks.90"): t.clone() for n, t in tensors.items()}
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / FILE, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match="another architecture"):
        adapters.use([Lora("bad", tmp_path / "bad", 1.0)])
    assert model.nbytes == size
    adapters.use([Lora(name, pristine / name, 1.0) for name in ("lora_0", "lora_1")])
    assert model.nbytes > size
