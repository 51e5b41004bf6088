# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a trained pruning is: a folder with `shiva.json` and `shiva.safetensors`.

The weights are one router, one ratio policy and one adapter; the JSON names the backbone they
belong to and has a table for each shipped budget, with what was measured of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shiva_kernels.adapter import Adapter
from shiva_kernels.backbones import backbone_of, blocks_of
from shiva_kernels.errors import ArtifactMismatch, ShivaError, Unsupported
from shiva_kernels.policy import RatioPolicy
from shiva_kernels.router import ShivaRouter
from shiva_kernels.tables import KTable, RatioCurve, build_table, nearest

FORMAT = 1
JSON_NAME, WEIGHTS_NAME = "shiva.json", "shiva.safetensors"
_PACKAGES = ("torch", "diffusers", "peft", "triton", "kubediffusion")
# A sample of the weights survives the rounding to bfloat16; another checkpoint does not.
_SKETCH = 8
_TOLERANCE = 2**-7


@dataclass(frozen=True)
class BackboneIdentity:
    """An architecture and a sample of its weights: a few numbers of every block."""

    architecture: str
    config: Mapping[str, Any]
    sketch: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, transformer: Any) -> BackboneIdentity:
        config = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dict(transformer.config).items()
            # The size of its training images changes no arithmetic of a given input.
            if not key.startswith("_") and key != "sample_size"
        }
        sketch = {name: _sample(block) for name, block in blocks_of(transformer)}
        return cls(type(transformer).__name__, config, sketch)

    def check(self, transformer: Any) -> None:
        """Raises ArtifactMismatch for another architecture or other weights."""
        other = BackboneIdentity.of(transformer)
        if other.architecture != self.architecture:
            raise ArtifactMismatch(
                f"the artifact was made for {self.architecture}, this is {other.architecture}"
            )
        for key in sorted(self.config.keys() | other.config.keys()):
            if self.config.get(key) != other.config.get(key):
                raise ArtifactMismatch(
                    f"the artifact was made for {key}={self.config.get(key)}, "
                    f"this transformer has {other.config.get(key)}"
                )
        for name, mine in self.sketch.items():
            if not _alike(mine, other.sketch[name]):
                raise ArtifactMismatch(
                    f"the artifact was made for other weights than these ({name} differs); use it "
                    "with the checkpoint that it was trained on"
                )


@dataclass(frozen=True)
class ShippedTable:
    """A budget that the artifact offers: its curve, the grid and size its quality was measured at.

    `quality` says what was measured there, by name.
    """

    budget: float
    curve: RatioCurve
    sigmas: tuple[float, ...]
    tokens: int
    quality: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class Artifact:
    """See the module. `multiple` is the step of k; None for tokens / 64."""

    backbone: BackboneIdentity
    router: ShivaRouter
    policy: RatioPolicy
    tables: dict[float, ShippedTable]
    adapter: Adapter | None = None
    multiple: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])
    router_options: Mapping[str, int] = field(default_factory=lambda: {"width": 64, "sharing": 2})

    @classmethod
    def untrained(
        cls,
        transformer: Any,
        *,
        tokens: int,
        sigmas: Sequence[float],
        budgets: Iterable[float] = (0.8, 0.6, 0.4),
        target: float = 0.6,
        width: int = 64,
        sharing: int = 2,
    ) -> Artifact:
        """A fresh router and policy with uniform tables: where training starts."""
        options = {"width": width, "sharing": sharing}
        count = len(blocks_of(transformer))
        curve = RatioCurve.uniform(count)
        return cls(
            BackboneIdentity.of(transformer),
            _router(transformer, options),
            RatioPolicy(count, target),
            {b: ShippedTable(b, curve, tuple(sigmas), tokens) for b in budgets},
            router_options=options,
        )

    def check_backbone(self, transformer: Any) -> None:
        self.backbone.check(transformer)

    def check_budget(self, budget: float) -> float:
        """The shipped budget that is meant. Raises Unsupported where there is none."""
        found = nearest(tuple(self.tables), budget)
        if found is None:
            offered = ", ".join(f"{b:g}" for b in sorted(self.tables, reverse=True))
            raise Unsupported(f"this artifact ships the budgets {offered}, not {budget:g}")
        return found

    def reference_table(self, budget: float) -> KTable:
        """k[step][block] on the grid and size that the budget was measured at."""
        t = self.tables[self.check_budget(budget)]
        return build_table(t.curve, t.budget, t.sigmas, t.tokens, self.multiple)

    # ------------------------------------------------------------------- files

    def save(self, folder: str | Path) -> Path:
        """Writes both files into `folder`, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"router.{k}": v for k, v in self.router.state_dict().items()}
        tensors |= {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        if self.adapter is not None:
            tensors |= {f"adapter.{k}": v for k, v in self.adapter.weights.items()}
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(own, folder / WEIGHTS_NAME)
        text = json.dumps(self._manifest(_digest(folder / WEIGHTS_NAME)), indent=1) + "\n"
        (folder / JSON_NAME).write_text(text)
        return folder

    def _manifest(self, digest: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "weights": {"file": WEIGHTS_NAME, "sha256": digest},
            "backbone": asdict(self.backbone),
            "router": dict(self.router_options),
            "adapter": dict(self.adapter.config) if self.adapter is not None else None,
            "multiple": self.multiple,
            "tables": [
                {**asdict(table), "k": self.reference_table(budget).k}
                for budget, table in sorted(self.tables.items(), reverse=True)
            ],
            "training": dict(self.training),
            "versions": _versions(),
        }

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> Artifact:
        """From a folder, or else from a repository of the Hugging Face hub.

        Raises ArtifactMismatch for files that are torn or of another format.
        """
        folder = Path(source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            files = [JSON_NAME, WEIGHTS_NAME]
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=files))
        try:
            manifest = json.loads((folder / JSON_NAME).read_text())
            digest = _digest(folder / WEIGHTS_NAME)
        except (OSError, ValueError) as error:
            raise ArtifactMismatch(f"{folder} is no pruning artifact: {error}") from error
        if manifest.get("format") != FORMAT:
            raise ArtifactMismatch(
                f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}"
            )
        if manifest["weights"]["sha256"] != digest:
            raise ArtifactMismatch(
                f"{folder / WEIGHTS_NAME} is not the file that {JSON_NAME} names"
            )
        return _read(manifest, load_file(folder / WEIGHTS_NAME))

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads both files into a repository, made if need be. Returns the commit's URL."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Shiva-DiT")
        return str(info.commit_url)


def _read(manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Artifact:
    """Raises ArtifactMismatch where weights and manifest do not fit."""
    try:
        identity = BackboneIdentity(**manifest["backbone"])
        tables = [_read_table(entry) for entry in manifest["tables"]]
        count, options = len(identity.sketch), manifest["router"]
        router_weights = _under(tensors, "router.")
        router = _router_like(router_weights, count, options)
        policy = RatioPolicy(count)
        policy.load_state_dict(_under(tensors, "policy."))
        adapter = None
        if manifest["adapter"] is not None:
            adapter = Adapter(manifest["adapter"], _under(tensors, "adapter."))
    except (KeyError, TypeError, RuntimeError, ShivaError) as error:
        raise ArtifactMismatch(f"the artifact is not whole: {error}") from error
    artifact = Artifact(
        identity,
        router,
        policy,
        {table.budget: table for table in tables},
        adapter,
        manifest["multiple"],
        manifest["training"],
        options,
    )
    for entry in manifest["tables"]:
        if [list(row) for row in artifact.reference_table(entry["budget"]).k] != entry["k"]:
            raise ArtifactMismatch(
                f"the table of budget {entry['budget']} does not follow its curve"
            )
    return artifact


def _read_table(entry: Mapping[str, Any]) -> ShippedTable:
    curve = RatioCurve(tuple(entry["curve"]["time"]), tuple(entry["curve"]["layer"]))
    return ShippedTable(
        entry["budget"], curve, tuple(entry["sigmas"]), entry["tokens"], entry["quality"]
    )


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _router(transformer: Any, options: Mapping[str, int]) -> ShivaRouter:
    widths = backbone_of(transformer).widths(transformer)
    count = len(blocks_of(transformer))
    return ShivaRouter(widths.dim, widths.time, widths.pooled, count, **options)


def _router_like(
    weights: Mapping[str, torch.Tensor], blocks: int, options: Mapping[str, int]
) -> ShivaRouter:
    """The widths are in the weights' own shapes."""
    dim, time, pooled = (weights[f"groups.0.proj_{part}.weight"].shape[1] for part in "xtp")
    router = ShivaRouter(dim, time, pooled, blocks, **options)
    router.load_state_dict(weights)
    return router


def _alike(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two samples are of one checkpoint. A model on the meta device has no numbers."""
    if not theirs:
        return True
    return all(abs(a - b) <= _TOLERANCE * abs(a) + 1e-6 for a, b in zip(mine, theirs, strict=True))


def _sample(block: torch.nn.Module) -> list[float]:
    """Evenly spaced numbers of the block's first matrix; nothing of a block without storage."""
    name, weight = next((n, p) for n, p in block.named_parameters() if p.ndim == 2)
    if weight.is_meta:
        return []
    if not weight.is_floating_point():
        raise Unsupported(
            f"{name} is quantised: apply the artifact to the unquantised transformer, then quantise"
        )
    flat = weight.detach().flatten()
    at = torch.linspace(0, flat.numel() - 1, _SKETCH, dtype=torch.float64).long()
    return [float(f"{v:.6g}") for v in flat[at.to(flat.device)].double().tolist()]


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
