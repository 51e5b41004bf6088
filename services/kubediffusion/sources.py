# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: a source's URI becomes a folder of this machine.

    file:///models/sd3          a folder, such as a mounted volume
    builtin://tiny-sd3          a model that comes with this package
    hf://org/name[/sub/folder]  a repository of the Hugging Face Hub, at a pinned revision

Downloads go into huggingface_hub's cache: files are shared by all processes of a machine, and serve
without a network. huggingface_hub itself takes a download up where its connection ended or timed
out; what it gives up at, a reset connection or an error of the server, is tried again here, a
little later each time, and then only whole files are kept. ``HF_TOKEN``,
``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean everywhere. Only
safetensors, JSON and tokenizer files are ever fetched.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from threading import Lock, RLock
from typing import Any

from kubediffusion.errors import (
    InvalidInput,
    KubeDiffusionError,
    SourceUnavailable,
    UnsupportedModel,
)

# (bytes so far, bytes of all files that have begun): neither ever falls, and they end up equal.
# Not called where nothing has to be fetched.
Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_PACKAGE = Path(__file__).parent
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)*")
# Seconds between attempts, and the HTTP status after which there is another.
_PAUSES = (1.0, 2.0, 4.0)
_PASSING = (500, 502, 503, 504)
_REVISION = re.compile(r"\w[\w.\-+@]*(/\w[\w.\-+@]*)*")


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
    SourceNotFound, RevisionNotFound, Unauthorized, Offline, DiskFull, Truncated), InvalidInput,
    and UnsupportedModel where `allow` names a file that is never fetched.
    """
    scheme, rest = _split(uri)
    _check_subfolder(subfolder)
    if scheme == "hf":
        return _open_hub(rest, revision, subfolder, allow, progress)
    root = _builtin(rest) if scheme == "builtin" else Path(rest)
    path = root / subfolder if subfolder else root
    try:
        found = path.exists()
        # Files may be links, as in the Hub's cache; a folder that leads elsewhere is no part.
        inside = not path.is_dir() or path.resolve().is_relative_to(root.resolve())
    except OSError as error:
        raise SourceUnavailable(
            f"{uri}: {path} cannot be read: {error.strerror}; let this process read it",
            field="uri",
            reason="Unauthorized" if error.errno in (errno.EACCES, errno.EPERM) else "",
        ) from error
    if not found:
        raise SourceUnavailable(
            f"{uri}: there is no {path}; check the path, and that the volume is mounted",
            field="uri",
            reason="SourceNotFound",
        )
    if not inside:
        raise InvalidInput(f"{subfolder!r} leads out of {uri}", field="subfolder")
    return LocalSource(path)


def read_index(uri: str, revision: str = "") -> Index:
    """What a pipeline's folder holds, without fetching its weights. Blocking.

    Raises SourceUnavailable, and UnsupportedModel where there is no pipeline.
    """
    source = open(uri, revision, allow=("model_index.json",))
    file = source.path / "model_index.json"
    try:
        raw = json.loads(file.read_text())
        if not isinstance(raw, dict):
            raise ValueError("it is no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        raise UnsupportedModel(
            f"{uri} has no model_index.json: it is no pipeline in diffusers' layout",
            field="spec.pipeline.source.uri",
            reason="WrongArchitecture",
        ) from None
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{uri}: model_index.json cannot be read: {error}; fetch it again",
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


def _check_subfolder(subfolder: str) -> None:
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder or "\0" in subfolder:
        raise InvalidInput(
            f"{subfolder!r} must be a folder inside of the source, such as 'transformer'",
            field="subfolder",
        )


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
    org, name, *below = [*rest.split("/"), ""]
    if not name:
        raise InvalidInput(f"hf://{rest}: write hf://org/name", field="uri")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidInput(f"{revision!r} is no branch, tag or commit", field="revision")
    repo = f"{org}/{name}"
    folder = "/".join(part for part in (*below, subfolder) if part)
    patterns = _patterns(f"{escape(folder)}/" if folder else "", allow)
    counter = _Counter(progress or (lambda done, total: None))
    bars = _bars(counter)
    for pause in (*_PAUSES, None):
        try:
            source = _fetch(repo, revision, folder, patterns, bars)
            break
        except Exception as error:
            problem = _hub_error(f"hf://{rest}", revision, error)
            if pause is None or not _may_pass(problem, error):
                raise problem from error
            log.warning("%s; again in %g s", problem, pause)
        time.sleep(pause)
    counter.finish()
    return source


def _fetch(repo: str, revision: str, folder: str, patterns: list[str], bars: Any) -> LocalSource:
    from huggingface_hub import snapshot_download

    snapshot = Path(
        snapshot_download(repo, revision=revision or None, allow_patterns=patterns, tqdm_class=bars)
    )
    commit = snapshot.name if _COMMIT.fullmatch(snapshot.name) else ""
    path = snapshot / folder
    if not path.exists():
        _keep_empty(path, repo, folder, commit)
    return LocalSource(path, commit)


def _patterns(prefix: str, allow: Sequence[str]) -> list[str]:
    """`allow`, narrowed to files that cannot run code."""
    out: list[str] = []
    for pattern in allow or ("*",):
        if pattern.endswith(_SUFFIXES):
            out.append(prefix + pattern)
        elif pattern.endswith("*"):
            out += [prefix + pattern + suffix for suffix in _SUFFIXES]
        else:
            raise UnsupportedModel(
                f"{pattern} is not fetched: only safetensors are loaded, as a pickle can run code",
                field="uri",
                reason="NotSafetensors",
            )
    return out


def _keep_empty(path: Path, repo: str, folder: str, commit: str) -> None:
    """A folder of the repository in which nothing is allowed is there all the same, but empty."""
    from huggingface_hub import HfApi

    if folder:
        next(iter(HfApi().list_repo_tree(repo, folder, revision=commit or None)), None)
    path.mkdir(parents=True, exist_ok=True)


class _Counter:
    """Adds up what several bars count in several threads."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._bars: list[Any] = []
        self._told = (0, 0)

    def add(self, bar: Any) -> None:
        self._bars.append(bar)

    def count(self, bar: Any, n: float) -> None:
        # There is a bar for bytes received and one for bytes written, of the same files: the
        # larger counts. A server that ignores Range makes them fall back; that is not told.
        with self._lock:
            bar.n += n
            done = max(self._told[0], *(int(each.n) for each in self._bars))
            total = max(self._told[1], done, *(int(each.total or 0) for each in self._bars))
            if (done, total) != self._told:
                self._told = (done, total)
                self._progress(done, total)

    def finish(self) -> None:
        """All is there. An attempt that failed had counted bytes which the next one skipped."""
        done, total = self._told
        if done < total:
            self._progress(total, total)


def _bars(counter: _Counter) -> Any:
    """The class of bars that huggingface_hub updates: they tell instead of drawing."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))
            if self.counts_bytes:
                counter.add(self)

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes:
                counter.count(self, n or 0)
            return None

    # tqdm's own lock is one of multiprocessing, whose helper process would outlive the download.
    Bar.set_lock(RLock())
    return Bar


def _hub_error(uri: str, revision: str, error: Exception) -> Exception:
    """What went wrong and what to do. huggingface_hub hides a cause behind "not in the cache"."""
    if isinstance(error, KubeDiffusionError):
        return error
    chain = _causes(error)
    # By name: its HTTP library, and so the classes of its errors, differ from version to version.
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    status = _status(chain)
    numbers = {each.errno for each in chain if isinstance(each, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        reason, text = "DiskFull", "the disk of the model cache is full; free some, or set HF_HOME"
    elif "GatedRepoError" in kinds or status in (401, 403):
        reason = "Unauthorized"
        text = (
            "access is refused, or there is no such repository; check the name, accept the "
            "model's terms, and set HF_TOKEN to a token that may read it"
        )
    elif "RevisionNotFoundError" in kinds:
        reason = "RevisionNotFound"
        text = f"there is no revision {revision or 'main'!r}; name a branch, tag or commit of it"
    elif "RemoteEntryNotFoundError" in kinds:
        reason, text = "SourceNotFound", "there is no such folder in the repository"
    elif "RepositoryNotFoundError" in kinds or status == 404:
        reason = "SourceNotFound"
        text = "there is no such repository, or HF_TOKEN may not see it; check the name"
    elif "HFValidationError" in kinds:
        return InvalidInput(f"{uri}: {error}", field="uri")
    elif kinds & {"RemoteProtocolError", "ReadError", "WriteError", "XetDownloadError"} or (
        "onsistency check" in str(error)
    ):
        reason = "Truncated"
        text = "the download broke off; try again, whole files are kept"
    elif status or kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError"}:
        why = f"answers with HTTP {status}" if status else "cannot be reached"
        reason, text = "Offline", f"the Hub {why} and the cache lacks these files; fetch them once"
    elif isinstance(error, OSError):
        reason, text = "", f"the model cache cannot be written: {error}; set HF_HOME"
    elif isinstance(error, ValueError):
        return UnsupportedModel(f"{uri}: {error}", field="uri", reason="BadWeights")
    else:
        return error
    return SourceUnavailable(f"{uri}: {text}", field="uri", reason=reason)


def _may_pass(problem: Exception, error: Exception) -> bool:
    """Whether the Hub, which is there, may do better in a moment. Without a network nothing will,
    and whoever waits shall know at once."""
    if not isinstance(problem, SourceUnavailable):
        return False
    return problem.reason == "Truncated" or _status(_causes(error)) in _PASSING


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _status(chain: Sequence[BaseException]) -> int:
    """Of the answer that an error came with; 0 where there was none."""
    return max(getattr(getattr(each, "response", None), "status_code", 0) for each in chain)
