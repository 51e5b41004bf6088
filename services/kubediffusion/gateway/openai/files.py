# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Images that an answer names by URL, kept in memory for a while."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kubediffusion.errors import Unavailable


@dataclass(frozen=True)
class StoredImage:
    data: bytes
    media_type: str
    expires: float  # on the store's clock, seconds


class ImageStore:
    """Holds at most `capacity` bytes, each image for `ttl` seconds; the oldest go first.

    Whoever knows a name can read its image, so names hold 192 random bits.
    """

    def __init__(self, *, capacity: int, ttl: float, now: Callable[[], float]) -> None:
        self._capacity = capacity
        self._ttl = ttl
        self._now = now
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._images)

    def add(self, images: Sequence[bytes], extension: str) -> list[str]:
        """Keeps the images of one answer and returns their names.

        Raises Unavailable when they cannot all be there at once.
        """
        needed = sum(map(len, images))
        if needed > self._capacity:
            raise Unavailable(
                f"the images take {needed} bytes and this gateway keeps {self._capacity} for "
                'answers by URL; use response_format "b64_json"',
                field="response_format",
                reason="ImageStoreTooSmall",
            )
        self._expire()
        while self._nbytes + needed > self._capacity:
            self._drop_oldest()
        expires = self._now() + self._ttl
        names = [f"{secrets.token_urlsafe(24)}.{extension}" for _ in images]
        for name, data in zip(names, images, strict=True):
            self._images[name] = StoredImage(data, f"image/{extension}", expires)
            self._nbytes += len(data)
        return names

    def get(self, name: str) -> tuple[StoredImage, float] | None:
        """The image and the seconds that it still has, or None."""
        self._expire()
        image = self._images.get(name)
        return None if image is None else (image, image.expires - self._now())

    def _expire(self) -> None:
        now = self._now()
        while self._images and next(iter(self._images.values())).expires <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, image = self._images.popitem(last=False)
        self._nbytes -= len(image.data)
