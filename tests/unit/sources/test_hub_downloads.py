# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights from the Hub: what is fetched, from where, and what happens when it does not come."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hub_server import CHUNK, COMMIT, FILES, Hub, served
from huggingface_hub import constants

from kubediffusion import sources
from kubediffusion.errors import InvalidInput, SourceUnavailable, UnsupportedModel

URI = "hf://org/name"
WEIGHTS = "transformer/model.safetensors"


def reason_of(call: Callable[[], Any]) -> str:
    with pytest.raises(SourceUnavailable) as failure:
        call()
    assert URI in failure.value.message
    return failure.value.reason


def test_a_branch_is_resolved_to_the_commit_that_is_then_served(hub: Hub) -> None:
    index = sources.read_index(URI, "main")
    assert index.commit == COMMIT
    assert index.components == {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    assert hub.fetched() == {"model_index.json"}

    hub.commits["main"] = "f" * 40  # the branch moves on
    source = sources.open(URI, index.commit)
    assert source.commit == COMMIT
    assert (source.path / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert all(f"/resolve/{COMMIT}/" in path for path in hub.paths("GET", "/resolve/"))


def test_only_what_is_needed_and_cannot_run_code_is_fetched(hub: Hub) -> None:
    sources.open(URI, COMMIT, allow=("transformer/*", "tokenizer*/*", "model_index.json"))
    wanted = {WEIGHTS, "transformer/config.json", "model_index.json"}
    assert hub.fetched() == wanted | {"tokenizer/merges.txt", "tokenizer_3/spiece.model"}


def test_without_patterns_all_is_fetched_but_pickles_and_code(hub: Hub) -> None:
    sources.open(URI)
    assert hub.fetched() == set(FILES) - {"README.md", "pipeline.py", "transformer/model.bin"}


def test_a_pickle_asked_for_by_name_is_refused(hub: Hub) -> None:
    with pytest.raises(UnsupportedModel) as failure:
        sources.open(URI, allow=("transformer/model.bin",))
    assert failure.value.reason == "NotSafetensors"
    assert not hub.requests


@pytest.mark.parametrize(("uri", "subfolder"), [(URI + "/lora", ""), (URI, "lora")])
def test_a_folder_of_a_repository_is_a_source(hub: Hub, uri: str, subfolder: str) -> None:
    source = sources.open(uri, "main", subfolder)
    assert [file.name for file in source.path.iterdir()] == ["ink.safetensors"]
    assert source.commit == COMMIT
    assert hub.fetched() == {"lora/ink.safetensors"}


@pytest.mark.parametrize("uri", [URI, URI + "/lora"])
def test_a_repository_without_the_files_asked_for_is_there_all_the_same(hub: Hub, uri: str) -> None:
    source = sources.open(uri, allow=("config.json",))
    assert source.commit == COMMIT
    assert list(source.path.iterdir()) == []


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = sources.open(URI)
    assert (source.path / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert all("authorization" not in headers for headers in hub.headers("GET", "/storage/"))


def test_without_the_token_access_is_refused(hub: Hub) -> None:
    hub.token = "hf_secret"
    assert reason_of(lambda: sources.open(URI)) == "Unauthorized"


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "Unauthorized"), (403, "Unauthorized"), (503, "Offline")]
)
def test_a_refusal_is_told_by_its_kind(
    hub: Hub, pauses: list[float], status: int, reason: str
) -> None:
    hub.status = status
    assert reason_of(lambda: sources.open(URI, "main")) == reason
    assert len(pauses) == (3 if status == 503 else 0)  # a refusal is not asked for again


def test_what_does_not_exist_is_told_by_its_kind(hub: Hub) -> None:
    with pytest.raises(SourceUnavailable, match="hf://org/other") as failure:
        sources.open("hf://org/other")
    assert failure.value.reason == "SourceNotFound"
    assert reason_of(lambda: sources.open(URI, "v9")) == "RevisionNotFound"
    assert reason_of(lambda: sources.open(URI, "e" * 40)) == "RevisionNotFound"
    assert reason_of(lambda: sources.open(URI, subfolder="nowhere")) == "SourceNotFound"


def test_a_download_cut_in_the_middle_goes_on_from_there(hub: Hub, pauses: list[float]) -> None:
    hub.cut_at = 12 * CHUNK + 345
    told: list[tuple[int, int]] = []
    source = sources.open(URI, progress=lambda *so_far: told.append(so_far))
    assert (source.path / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    ranges = [headers.get("range") for headers in hub.headers("GET", WEIGHTS)]
    assert ranges == [None, f"bytes={12 * CHUNK}-"]
    assert_progress(told, hub)


def test_a_connection_reset_in_the_middle_of_a_file_is_tried_again(
    hub: Hub, pauses: list[float]
) -> None:
    hub.cut_at, hub.cut_resets = 12 * CHUNK + 345, True
    told: list[tuple[int, int]] = []
    source = sources.open(URI, progress=lambda *so_far: told.append(so_far))
    assert (source.path / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert pauses == [1.0]
    assert told[-1][0] == told[-1][1]
    assert_never_falls(told)


@pytest.mark.parametrize("resets", [1, 2, 3])
def test_requests_that_get_a_reset_are_sent_again_after_growing_pauses(
    hub: Hub, pauses: list[float], resets: int
) -> None:
    hub.resets = resets
    index = sources.read_index(URI)
    assert index.commit == COMMIT
    assert pauses == [1.0, 2.0, 4.0][:resets]


def test_a_hub_that_resets_every_connection_is_given_up(hub: Hub, pauses: list[float]) -> None:
    hub.resets = 1000
    assert reason_of(lambda: sources.open(URI)) == "Truncated"
    assert pauses == [1.0, 2.0, 4.0]


def test_a_hub_that_is_down_for_a_moment_is_asked_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        hub.status = 0

    monkeypatch.setattr("time.sleep", sleep)
    hub.status = 502
    assert sources.open(URI).commit == COMMIT


def test_a_download_that_never_comes_whole_is_told_and_leaves_nothing_behind(
    hub: Hub, tmp_path: Path, pauses: list[float]
) -> None:
    hub.cut_at, hub.cut_always = 0, True
    assert reason_of(lambda: sources.open(URI)) == "Truncated"
    assert not list(tmp_path.rglob("*.incomplete"))
    hub.cut_at = None
    source = sources.open(URI)
    assert (source.path / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_progress_never_falls_and_ends_at_the_total(hub: Hub) -> None:
    told: list[tuple[int, int]] = []
    sources.open(URI, progress=lambda *so_far: told.append(so_far))
    assert_progress(told, hub)
    told.clear()
    sources.open(URI, progress=lambda *so_far: told.append(so_far))
    assert not told  # nothing had to be fetched


def assert_progress(told: list[tuple[int, int]], hub: Hub) -> None:
    size = sum(len(FILES[name]) for name in hub.fetched())
    assert told[-1] == (size, size)
    assert_never_falls(told)


def assert_never_falls(told: list[tuple[int, int]]) -> None:
    assert all(done <= total for done, total in told)
    for first, second in pairwise(told):
        assert second[0] >= first[0]
        assert second[1] >= first[1]


def test_progress_of_two_downloads_is_kept_apart(hub: Hub) -> None:
    first: list[tuple[int, int]] = []
    second: list[tuple[int, int]] = []
    sources.open(URI, allow=("transformer/*",), progress=lambda *so_far: first.append(so_far))
    sources.open(URI, allow=("lora/*",), progress=lambda *so_far: second.append(so_far))
    assert second[-1] == (300, 300)


def test_a_listener_that_raises_ends_the_download(hub: Hub) -> None:
    class EnoughError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        sources.open(URI, progress=stop)


def test_what_was_fetched_once_serves_without_a_network(
    connect: Callable[[Hub], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(Hub(dict(FILES))) as hub:
        connect(hub)
        sources.open(URI, "main", allow=("transformer/*",))
    online = len(hub.requests)
    for offline in (False, True):  # the server is gone; then it is not even asked for
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        source = sources.open(URI, "main", allow=("transformer/*",))
        assert source.commit == COMMIT
        assert (source.path / WEIGHTS).read_bytes() == FILES[WEIGHTS]
        assert reason_of(lambda: sources.open(URI, "main", allow=("lora/*",))) == "Offline"
        assert reason_of(lambda: sources.open(URI, "v2")) == "Offline"
    assert len(hub.requests) == online


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name.endswith(".incomplete"):
            return Full(self, "w")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    assert reason_of(lambda: sources.open(URI)) == "DiskFull"
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("name", ["../../evil.json", "/evil.json", "a/../../../evil.json"])
def test_a_repository_cannot_write_outside_of_its_folder(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    hub.files = {name: b"{}"}
    with pytest.raises(UnsupportedModel):
        sources.open(URI)
    assert not list(tmp_path.parent.rglob("evil.json"))


@pytest.mark.parametrize(
    "revision", ["../../x", "a/../../x", "/etc/passwd", "a b", ".hidden", "a/"]
)
def test_a_revision_that_is_no_name_is_refused_before_anything_is_asked(
    hub: Hub, revision: str
) -> None:
    with pytest.raises(InvalidInput) as failure:
        sources.open(URI, revision)
    assert failure.value.field == "revision"
    assert not hub.requests


def test_the_environment_means_what_it_means_everywhere(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    code = (
        "import sys; from kubediffusion import sources; s = sources.open('hf://org/name/lora');"
        "assert 'torch' not in sys.modules; print(s.commit, s.path)"
    )
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    commit, path = done.stdout.split()
    assert commit == COMMIT
    assert Path(path).is_relative_to(tmp_path / "home")
    assert done.stderr == ""  # no bars in a service's log
