# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kubediffusion import sources


@dataclass(frozen=True)
class Stored:
    """A model in a folder of this machine; `uri` is what a workflow calls it."""

    uri: str
    nbytes: int
    commits: tuple[str, ...] = ()


def builtin_models() -> list[Stored]:
    """Those that come with this package."""
    uris = [f"builtin://{name}" for name in sources.builtins()]
    return [Stored(uri, _size(sources.open(uri).path)) for uri in uris]


def downloaded_models() -> list[Stored]:
    """Repositories in huggingface_hub's cache that hold a pipeline or a part of one."""
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:  # the control plane installs without it
        return []
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    return [
        Stored(
            f"hf://{repo.repo_id}",
            repo.size_on_disk,
            tuple(sorted(revision.commit_hash for revision in repo.revisions)),
        )
        for repo in sorted(cache.repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
