# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures in and out: uploads are checked before any node sees them, results become PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from kubediffusion.errors import InvalidInput

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_UPLOAD_BYTES = 32 * 1024 * 1024
MAX_UPLOAD_PIXELS = 32 * 1024 * 1024
# The compressed header may promise far more than it holds; a picture may be so long and no longer.
MAX_SIDE = 16_384


def check_upload(data: bytes, field: str) -> tuple[int, int]:
    """Decodes an upload wholly, so that no node is handed what is not one; its (width, height).

    Raises InvalidInput naming `field`: not PNG, JPEG or WebP, truncated, animated, too large.
    """
    if not data:
        raise InvalidInput("the image is empty; send the bytes of a PNG, JPEG or WebP", field=field)
    if len(data) > MAX_UPLOAD_BYTES:
        raise InvalidInput(
            f"the image has {len(data)} bytes; at most {MAX_UPLOAD_BYTES} are taken", field=field
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_size(width, height, _frames(image), field)
            image.verify()  # checksums and the end, which `load` does without
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except InvalidInput:
        raise
    except UnidentifiedImageError:
        raise InvalidInput(
            "this is not an image; send the bytes of a PNG, JPEG or WebP", field=field
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise InvalidInput(
            f"the image unpacks to too much; at most {MAX_UPLOAD_PIXELS} pixels are taken",
            field=field,
        ) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InvalidInput(
            f"the image is damaged or cut off ({error}); send it whole", field=field
        ) from None
    return width, height


def _check_size(width: int, height: int, frames: int, field: str) -> None:
    if width * height > MAX_UPLOAD_PIXELS or max(width, height) > MAX_SIDE:
        raise InvalidInput(
            f"the image has {width} x {height} pixels; at most {MAX_UPLOAD_PIXELS} in all and "
            f"{MAX_SIDE} a side are taken: scale it down",
            field=field,
        )
    if frames != 1:
        raise InvalidInput(
            f"the image is animated ({frames} frames); send a still one", field=field
        )


def _frames(image: Image.Image) -> int:
    # Phones put a second picture (a depth map, a larger view) behind a JPEG's end, which Pillow
    # then calls MPO. It is no animation, and the first picture is the one that was meant.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def to_image(pixels: np.ndarray, shape: Sequence[int]) -> Image.Image:
    """uint8 bytes of shape (height, width, 3), as a node's decode stage gives them."""
    height, width, _ = shape
    return Image.frombytes("RGB", (width, height), pixels.tobytes())


def encode_png(image: Image.Image) -> bytes:
    """Byte for byte what `image.save("x.png")` writes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
