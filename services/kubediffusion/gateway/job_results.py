# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where images of ended jobs lie when the database is to be small: a folder or a bucket.

An image is `JOB/EPOCH/NUMBER.png` under the root. The epoch is in its name because two gateways may
write the end of one job: the database says which of them counts, and neither can spoil the other's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from fsspec.core import url_to_fs

from kubediffusion.errors import Unavailable
from kubediffusion.v1alpha1 import gateway_pb2

log = logging.getLogger(__name__)
# A file system raises OSErrors, and whatever the service behind it raises.
_ANY = Exception
_BUCKETS = ("s3", "gs", "az")


class JobResults:
    """All of it blocks. Raises Unavailable, reason JobResults, wherever the storage does not do."""

    def __init__(self, url: str) -> None:
        """`url`: file:///folder, s3://bucket/prefix (gs:// and az:// alike), or another that fsspec
        knows. Keys and endpoints are the environment's: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ..."""
        self._url = url
        try:
            if (scheme := url.partition("://")[0]) in _BUCKETS:
                from obstore.fsspec import register

                register(scheme)
            files, root = url_to_fs(url)
            self._files: Any = files
            self._root = str(root).rstrip("/")
            self._files.makedirs(self._root, exist_ok=True)
            # A bucket that is not there, or may not be written, is told now: not at the first job.
            self._files.pipe_file(f"{self._root}/.writable", b"")
        except ImportError as error:
            raise self._trouble(
                f"{error} (for s3://: pip install 'kubediffusion[s3]')", "opened"
            ) from error
        except _ANY as error:
            raise self._trouble(error, "opened") from error

    def write(self, job: str, epoch: int, images: Sequence[gateway_pb2.Image]) -> list[str]:
        """Their names, which `read` takes."""
        names = [f"{job}/{epoch}/{number}.png" for number in range(len(images))]
        try:
            if names:
                self._files.makedirs(f"{self._root}/{job}/{epoch}", exist_ok=True)
            for name, image in zip(names, images, strict=True):
                self._files.pipe_file(f"{self._root}/{name}", image.png)
        except _ANY as error:
            raise self._trouble(error, "written") from error
        return names

    def read(self, name: str) -> bytes:
        try:
            return cast("bytes", self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError as error:
            raise Unavailable(
                f"the job's image is not in the job results any more: {self._url}/{name} was "
                "removed by somebody else",
                reason="JobResults",
            ) from error
        except _ANY as error:
            raise self._trouble(error, "read") from error

    def remove(self, *path: object) -> None:
        """A job, or one epoch of it. What cannot be removed is said in the log: nobody waits."""
        where = "/".join([self._root, *map(str, path)])
        try:
            if self._files.exists(where):
                self._files.rm(where, recursive=True)
        except _ANY as error:
            log.warning("job results: %s stays: %s", where, _words(error))

    def _trouble(self, error: object, what: str) -> Unavailable:
        return Unavailable(
            f"the job results at {self._url} cannot be {what}: {_words(error)}",
            field="job_results",
            reason="JobResults",
        )


def _words(error: object) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
