# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that speaks as much of the Hub's API as a download needs, faults included.

Weights (`*.safetensors`) are large files: the answer to HEAD redirects to another host, as the
Hub's redirects to its storage, and only there the bytes are served, in the ranges asked for.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, SO_LINGER, SOL_SOCKET, socket
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of so many bytes huggingface_hub writes to disk at once; it resumes after the last whole chunk.
CHUNK = 10_000

INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.36.0",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "text_encoder_3": [None, None],
    "vae": ["diffusers", "AutoencoderKL"],
}
FILES = {
    "model_index.json": json.dumps(INDEX).encode(),
    "README.md": b"# a card",
    "pipeline.py": b"print('ran')",
    "transformer/config.json": b"{}",
    "transformer/model.safetensors": bytes(range(256)) * 1200,
    "transformer/model.bin": b"a pickle",
    "tokenizer/merges.txt": b"a b",
    "tokenizer_3/spiece.model": b"pieces",
    "lora/ink.safetensors": b"ink" * 100,
}


@dataclass
class Hub:
    """One repository, `org/name`, and how to serve it."""

    files: dict[str, bytes]
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    token: str = ""  # given: only with this one
    status: int = 0  # given: the answer to everything
    cut_at: int | None = None  # the first answer with a large file's bytes breaks off here
    cut_always: bool = False
    cut_resets: bool = False  # by a reset of the connection, not by its end
    resets: int = 0  # so many requests more get a reset for an answer
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    storage: str = ""

    def paths(self, method: str, part: str) -> list[str]:
        return [path for verb, path, _ in self.requests if verb == method and part in path]

    def headers(self, method: str, part: str) -> list[dict[str, str]]:
        return [h for verb, path, h in self.requests if verb == method and part in path]

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        small = {p.split("/resolve/")[1].split("/", 1)[1] for p in self.paths("GET", "/resolve/")}
        return small | {p.removeprefix("/storage/") for p in self.paths("GET", "/storage/")}


@contextmanager
def served(hub: Hub, host: str = "127.0.0.1", port: int = 0) -> Iterator[Hub]:
    """On loopback its storage has another name, so that a redirect leads to another host, which is
    what makes it one for huggingface_hub; elsewhere large files are served as small ones are.
    """
    connections: list[socket] = []

    class Handler(_Handler):
        def __init__(self, *args: Any) -> None:
            self.hub = hub
            super().__init__(*args)

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://{host}:{server.server_port}"
    if host == "127.0.0.1":
        hub.storage = f"http://localhost:{server.server_port}/storage"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        for connection in connections:  # a client may keep one for its next request
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        if self.hub.resets:
            self.hub.resets -= 1
            return self._reset()
        if self.hub.status:
            return self._answer(self.hub.status)
        if path.startswith("/storage/"):
            return self._bytes(self.hub.files[path.removeprefix("/storage/")])
        if self.hub.token and headers.get("authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, code="GatedRepo")
        if path.startswith("/api/models/org/name/"):
            kind, _, rest = path.removeprefix("/api/models/org/name/").partition("/")
            revision, _, folder = rest.partition("/") if kind == "tree" else (rest, "", "")
            return self._api(kind, revision, folder)
        if path.startswith("/org/name/resolve/"):
            revision, _, name = path.removeprefix("/org/name/resolve/").partition("/")
            return self._resolve(revision, name)
        return self._answer(404, code="RepoNotFound")

    def _api(self, kind: str, revision: str, folder: str) -> None:
        commit = self.hub.commits.get(revision)
        if commit is None:
            return self._answer(404, code="RevisionNotFound")
        if kind == "revision":
            return self._json({"_id": "1", "id": "org/name", "sha": commit, "siblings": []})
        names = [n for n in self.hub.files if not folder or n.startswith(f"{folder}/")]
        if not names:
            return self._answer(404, code="EntryNotFound")
        return self._json([_entry(name, self.hub.files[name]) for name in names])

    def _resolve(self, revision: str, name: str) -> None:
        if name not in self.hub.files:
            return self._answer(404, code="EntryNotFound")
        data = self.hub.files[name]
        about = {"X-Repo-Commit": self.hub.commits[revision], "ETag": f'"{_etag(name, data)}"'}
        if not name.endswith(".safetensors") or not self.hub.storage:
            return self._bytes(data, about)
        about["X-Linked-ETag"] = about["ETag"]
        about["X-Linked-Size"] = str(len(data))
        about["Location"] = f"{self.hub.storage}/{name}"
        return self._answer(302, headers=about)

    def _bytes(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        status, headers, start = 200, dict(headers or {}), 0
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        cut = self.hub.cut_at
        # Files come at once, in any order: one that is shorter than the cut is not meant.
        if cut is not None and len(body) > cut and self.path.startswith("/storage/"):
            body, whole = body[:cut], len(body)
            if not self.hub.cut_always:
                self.hub.cut_at = None
            self._answer(status, body, headers | {"Content-Length": str(whole)})
            if self.hub.cut_resets:
                self._reset()
            self.close_connection = True
            return
        self._answer(status, body, headers)

    def _reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)  # for no time at all: what was not sent is dropped
        self.connection.setsockopt(SOL_SOCKET, SO_LINGER, linger)
        self.rfile.close()
        self.connection.close()

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, code: str = ""
    ) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | (headers or {})
        if code:
            headers["X-Error-Code"] = code
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(name: str, data: bytes) -> str:
    algorithm = "sha256" if name.endswith(".safetensors") else "sha1"
    return hashlib.new(algorithm, data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
    }
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry
