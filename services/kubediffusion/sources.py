# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: a source's URI becomes a folder of this machine.

    file:///models/sd3          a folder, such as a mounted volume
    builtin://tiny-sd3          a model that comes with this package
    hf://org/name[/sub/folder]  a repository of the Hugging Face Hub, at a pinned revision

Downloads go into huggingface_hub's cache: they resume where they were cut off, are shared by all
processes of a machine, and serve without a network. ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` mean what they mean everywhere. Only safetensors, JSON and tokenizer files are
ever fetched.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubediffusion.errors import InvalidInput, SourceUnavailable, UnsupportedModel

# (bytes so far, bytes in all); 0 in all while that is unknown.
Progress = Callable[[int, int], None]

_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_PACKAGE = Path(__file__).parent
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)*")


@dataclass(frozen=True)
class LocalSource:
    """`path` is the source's folder (or file); `commit` is "" where sources have no revisions."""

    path: Path
    commit: str = ""


@dataclass(frozen=True)
class Index:
    """A pipeline's model_index.json: class names by component; absent components are left out."""

    components: Mapping[str, str]
    commit: str = ""


def open(  # noqa: A001 - read as `sources.open`
    uri: str,
    revision: str = "",
    subfolder: str = "",
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> LocalSource:
    """The files of a source, on this machine. Blocking.

    `allow` are glob patterns below the source's root that are needed; all files where empty. A
    branch or tag as `revision` is resolved to a commit. Raises SourceUnavailable (reasons
    SourceNotFound, RevisionNotFound, Unauthorized, Offline, DiskFull, Truncated) and InvalidInput.
    """
    scheme, rest = _split(uri)
    if scheme == "hf":
        source = _open_hub(rest, revision, subfolder, allow, progress)
    elif scheme == "builtin":
        source = LocalSource(_builtin(rest))
    else:
        source = LocalSource(Path(rest))
    path = source.path / subfolder if subfolder else source.path
    if not path.exists():
        raise SourceUnavailable(
            f"{uri}: there is no {path}; check the path, and that the volume is mounted",
            field="uri",
            reason="SourceNotFound",
        )
    return LocalSource(path, source.commit)


def read_index(uri: str, revision: str = "") -> Index:
    """What a pipeline's folder holds, without fetching its weights. Blocking.

    Raises SourceUnavailable, and UnsupportedModel where there is no pipeline.
    """
    source = open(uri, revision, allow=("model_index.json",))
    file = source.path / "model_index.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise UnsupportedModel(
            f"{uri} has no model_index.json: it is no pipeline in diffusers' layout",
            field="spec.pipeline.source.uri",
            reason="WrongArchitecture",
        ) from None
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{uri}: model_index.json cannot be read: {error}",
            field="spec.pipeline.source.uri",
            reason="BadWeights",
        ) from error
    components = {
        name: entry[1]
        for name, entry in raw.items()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }
    return Index(components, source.commit)


def builtins() -> list[str]:
    """Names of the models that come with this package."""
    names = {p.parent.parent.name for p in _builtin_root().glob("*/pipeline/model_index.json")}
    return sorted(names)


def _split(uri: str) -> tuple[str, str]:
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("file", "builtin", "hf") or not rest:
        raise InvalidInput(
            f"{uri!r} is no source; write file:///path, builtin://name or hf://org/name",
            field="uri",
        )
    if scheme != "file" and (not _NAME.fullmatch(rest) or ".." in rest):
        raise InvalidInput(f"{uri!r}: {rest!r} is no name of a source", field="uri")
    return scheme, rest


def _builtin_root() -> Path:
    """Beside the package in an installed one, at the top of a source checkout otherwise."""
    installed = _PACKAGE / "builtin"
    return installed if installed.is_dir() else _PACKAGE.parent.parent / "models"


def _builtin(rest: str) -> Path:
    name, _, below = rest.partition("/")
    path = _builtin_root() / name / (below or "pipeline")
    if not path.exists():
        raise SourceUnavailable(
            f"builtin://{rest} does not come with this version; it has "
            f"{', '.join(builtins()) or 'none'}",
            field="uri",
            reason="SourceNotFound",
        )
    return path


# ---------------------------------------------------------------- the Hub


def _open_hub(
    rest: str, revision: str, subfolder: str, allow: Sequence[str], progress: Progress | None
) -> LocalSource:
    from huggingface_hub import snapshot_download

    org, name, *below = [*rest.split("/"), ""]
    if not name:
        raise InvalidInput(f"hf://{rest}: write hf://org/name", field="uri")
    folder = "/".join(part for part in (*below, subfolder) if part)
    prefix = f"{folder}/" if folder else ""
    patterns = [prefix + pattern for pattern in (allow or _FILES)]
    reporter: dict[str, Any] = {} if progress is None else {"tqdm_class": _reporter(progress)}
    try:
        path = snapshot_download(
            f"{org}/{name}",
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=["*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.onnx"],
            **reporter,
        )
    except Exception as error:
        raise _hub_error(f"hf://{rest}", revision, error) from error
    commit = Path(path).name
    root = Path(path)
    for part in below:
        root = root / part if part else root
    return LocalSource(root, commit if _COMMIT.fullmatch(commit) else "")


def _reporter(progress: Progress) -> Any:
    """The bar that huggingface_hub updates, told on instead of drawn."""
    from tqdm import tqdm

    class Reporter(tqdm):
        """Files of a snapshot download at once; the bytes of all of them are added up."""

        done = 0
        total_bytes = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)
            if self.counts_bytes:
                Reporter.total_bytes += int(kwargs.get("total") or 0)
                Reporter.done += int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes:
                Reporter.done += int(n or 0)
                progress(Reporter.done, max(Reporter.total_bytes, Reporter.done))
            return None

    return Reporter


def _hub_error(uri: str, revision: str, error: Exception) -> Exception:
    """What went wrong and what to do, by the kind of huggingface_hub's error."""
    from huggingface_hub import errors as hub

    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if full or "No space left" in str(error):
        reason, text = "DiskFull", "the disk of the model cache is full; free some, or set HF_HOME"
    elif isinstance(error, hub.GatedRepoError) or status in (401, 403):
        reason = "Unauthorized"
        text = "access is refused; accept the model's terms and set HF_TOKEN to a token that may"
    elif isinstance(error, hub.RevisionNotFoundError):
        reason, text = "RevisionNotFound", f"there is no revision {revision!r}; fix it"
    elif isinstance(error, hub.RepositoryNotFoundError):
        reason = "SourceNotFound"
        text = "there is no such repository, or HF_TOKEN may not see it"
    elif isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        reason = "Offline"
        text = "the Hub cannot be reached and the cache has no such files; connect once to fetch"
    elif "onsistency check" in str(error) or "ncomplete" in str(error):
        reason, text = "Truncated", "the download broke off; it goes on from there at the next try"
    elif isinstance(error, hub.HFValidationError):
        return InvalidInput(f"{uri}: {error}", field="uri")
    elif isinstance(error, OSError) or status:
        reason, text = "Offline", f"the Hub does not answer ({type(error).__name__}: {error})"
    else:
        return error
    return SourceUnavailable(f"{uri}: {text}", field="uri", reason=reason)
