# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where pictures are written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kubediffusion.errors import InvalidInput, Unavailable


class Destination:
    """`out.png`, or for several pictures `out-1.png`, `out-2.png`, …"""

    def __init__(self, path: Path, count: int) -> None:
        """Makes the folder. Raises InvalidInput where no picture can be written."""
        if path.is_dir():
            raise InvalidInput(f"{path} is a folder; name a file in it", field="-o")
        if path.suffix.lower() != ".png":
            raise InvalidInput(f"{path}: pictures are PNG; end the name with .png", field="-o")
        self._path = path
        self._count = count
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            for index in range(count):
                target = self.path(index)
                if target.exists() and not os.access(target, os.W_OK):
                    raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise InvalidInput(
                f"cannot write {path}: {error.strerror}; choose another place", field="-o"
            ) from None

    def path(self, index: int) -> Path:
        if self._count == 1:
            return self._path
        return self._path.with_stem(f"{self._path.stem}-{index + 1}")

    def write(self, index: int, png: bytes) -> Path:
        """Whole or not at all."""
        path = self.path(index)
        fresh = path.with_name(f".{path.name}.part")
        try:
            fresh.write_bytes(png)
            fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise Unavailable(f"cannot write {path}: {error.strerror}", field="-o") from None
        return path
