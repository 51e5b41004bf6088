# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from tiny_backbones import PAIR, artifact_of, call, inputs, make

from shiva_kernels import (
    Artifact,
    ArtifactMismatch,
    ShivaConfig,
    ShivaError,
    Unsupported,
    apply_shiva,
)
from shiva_kernels.adapter import Adapter

DORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 4,
    "use_dora": True,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"],
}


def trained_adapter(seed: int = 7) -> tuple[Adapter, torch.Tensor]:
    """A DoRA that changes things, and what the transformer gives with it, unmerged and dense."""
    transformer = make("sd3")
    transformer.add_adapter(LoraConfig(**DORA), adapter_name="shiva")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    weights = get_peft_model_state_dict(transformer, adapter_name="shiva")
    adapter = Adapter(DORA, {k: v.detach().clone() for k, v in weights.items()})
    return adapter, call(transformer, inputs("sd3", 2))


def with_adapter() -> tuple[Artifact, torch.Tensor]:
    artifact = artifact_of(make("sd3"))
    artifact.adapter, out = trained_adapter()
    return artifact, out


def test_a_saved_artifact_prunes_as_it_did(tmp_path: Path) -> None:
    artifact, _ = with_adapter()
    one = make("sd3")
    apply_shiva(one, ShivaConfig(artifact, 0.6, guidance=PAIR))
    expected = call(one, inputs("sd3", 2))
    artifact.save(tmp_path / "a")
    two = make("sd3")
    handle = apply_shiva(two, ShivaConfig(str(tmp_path / "a"), 0.6, guidance=PAIR))
    assert torch.equal(call(two, inputs("sd3", 2)), expected)
    assert handle.artifact.tables == artifact.tables
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["shiva.json", "shiva.safetensors"]
    written = json.loads((tmp_path / "a" / "shiva.json").read_text())
    assert [t["budget"] for t in written["tables"]] == [0.8, 0.6, 0.4]
    assert all(len(t["k"]) == 8 and len(t["k"][0]) == 5 for t in written["tables"])


def test_the_adapter_is_merged_and_no_layer_of_it_remains() -> None:
    artifact, unmerged = with_adapter()
    transformer = make("sd3")
    kinds = [type(m) for m in transformer.modules()]
    base = call(transformer, inputs("sd3", 2))
    handle = apply_shiva(transformer, ShivaConfig(artifact, None))
    adapted = call(transformer, inputs("sd3", 2))
    assert torch.allclose(adapted, unmerged, atol=1e-4)
    assert not torch.allclose(adapted, base, atol=1e-2)
    assert [type(m) for m in transformer.modules()] == kinds
    assert not hasattr(transformer, "peft_config")
    handle.remove()
    assert torch.equal(call(transformer, inputs("sd3", 2)), base)


def test_a_server_need_not_keep_the_dense_weights() -> None:
    artifact, _ = with_adapter()
    transformer = make("sd3")
    handle = apply_shiva(transformer, ShivaConfig(artifact, 0.6, guidance=PAIR, keep_dense=False))
    before = call(transformer, inputs("sd3", 2))
    with pytest.raises(ShivaError, match="load the transformer again"):
        handle.remove()
    assert torch.equal(call(transformer, inputs("sd3", 2)), before)


def test_layers_replaced_since_cannot_be_made_dense_again() -> None:
    """As quantisation replaces them."""
    artifact, _ = with_adapter()
    transformer = make("sd3")
    handle = apply_shiva(transformer, ShivaConfig(artifact, 0.6, guidance=PAIR))
    transformer.transformer_blocks[1].attn.to_q = torch.nn.Linear(32, 32)
    with pytest.raises(ShivaError, match="have been replaced"):
        handle.remove()


def test_a_users_lora_goes_on_top_and_comes_off_again() -> None:
    artifact, _ = with_adapter()
    transformer = make("sd3")
    handle = apply_shiva(transformer, ShivaConfig(artifact, 0.6, guidance=PAIR))
    before = call(transformer, inputs("sd3", 2))
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert not torch.allclose(call(transformer, inputs("sd3", 2)), before, atol=1e-2)
    transformer.disable_adapters()
    assert torch.equal(call(transformer, inputs("sd3", 2)), before)
    transformer.delete_adapters("style")
    handle.remove()
    assert torch.equal(call(transformer, inputs("sd3", 2)), call(make("sd3"), inputs("sd3", 2)))


def test_loras_that_came_first_are_refused() -> None:
    artifact, _ = with_adapter()
    transformer = make("sd3")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(Unsupported, match="then load LoRAs on top"):
        apply_shiva(transformer, ShivaConfig(artifact, 0.6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_backbone_is_known_in_another_dtype(dtype: torch.dtype) -> None:
    artifact = artifact_of(make("sd3"))
    artifact.check_backbone(make("sd3").to(dtype))


def test_another_backbone_is_refused() -> None:
    artifact = artifact_of(make("sd3"))
    with pytest.raises(ArtifactMismatch, match="SD3Transformer2DModel, this is FluxTransformer"):
        artifact.check_backbone(make("flux"))
    with pytest.raises(ArtifactMismatch, match="dual_attention_layers"):
        artifact.check_backbone(make("sd35"))
    with pytest.raises(ArtifactMismatch, match="other weights"):
        artifact.check_backbone(make("sd3", seed=1))


def test_an_adapter_of_another_shape_is_refused_and_leaves_nothing_behind() -> None:
    artifact, _ = with_adapter()
    assert artifact.adapter is not None
    weights = dict(artifact.adapter.weights)
    weights.pop(next(iter(weights)))
    artifact.adapter = Adapter(DORA, weights)
    transformer = make("sd3")
    base = call(transformer, inputs("sd3", 2))
    with pytest.raises(ArtifactMismatch, match="does not fit"):
        apply_shiva(transformer, ShivaConfig(artifact, 0.6))
    assert torch.equal(call(transformer, inputs("sd3", 2)), base)
    assert not hasattr(transformer, "peft_config")


def break_weights(folder: Path) -> None:
    file = folder / "shiva.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def break_format(folder: Path) -> None:
    edit(folder, lambda m: m.update(format=99))


def break_table(folder: Path) -> None:
    edit(folder, lambda m: m["tables"][0]["k"][0].__setitem__(1, 1))


def break_router(folder: Path) -> None:
    edit(folder, lambda m: m["router"].update(width=32))


def remove_manifest(folder: Path) -> None:
    (folder / "shiva.json").unlink()


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "shiva.json").read_text())
    change(manifest)
    (folder / "shiva.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_weights, "not the file"),
        (break_format, "format 99"),
        (break_table, "curve"),
        (break_router, "not whole"),
        (remove_manifest, "no pruning artifact"),
    ],
)
def test_a_torn_artifact_is_refused(tmp_path: Path, harm: Any, message: str) -> None:
    artifact_of(make("sd3")).save(tmp_path)
    harm(tmp_path)
    with pytest.raises(ArtifactMismatch, match=message):
        Artifact.load(tmp_path)


def test_push_and_load_go_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(token)

        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((repo, private, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            return type("info", (), {"commit_url": f"https://hub/{repo_id}"})

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    artifact = artifact_of(make("sd3"))
    assert artifact.push_to_hub("org/pruning", private=True) == "https://hub/org/pruning"
    loaded = Artifact.load("org/pruning", revision="v1")
    assert loaded.tables == artifact.tables
    assert calls == [
        None,
        ("org/pruning", True, True),
        ("org/pruning", "v1", ["shiva.json", "shiva.safetensors"]),
    ]
