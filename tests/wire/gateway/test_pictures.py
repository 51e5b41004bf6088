# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Uploads that are none, and hooks that look at what goes in and comes out."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from gateways import CONFIG, assert_empty, events_of, gateway_over, images, one_node, request
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kubediffusion.errors import Internal, InvalidInput
from kubediffusion.gateway.hooks import load_hooks
from kubediffusion.gateway.images import MAX_SIDE, check_upload, encode_png, to_image


def encoded(kind: str, width: int = 6, height: int = 4, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that promises very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_usual_formats_are_taken(kind):
    assert check_upload(encoded(kind), "f") == (6, 4)


def test_a_phones_jpeg_with_a_second_picture_behind_it_is_a_jpeg():
    second = Image.new("RGB", (6, 4), (0, 0, 0))
    assert check_upload(encoded("MPO", save_all=True, append_images=[second]), "f") == (6, 4)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (encoded("GIF"), "not an image"),
        (encoded("BMP"), "not an image"),
        (encoded("PNG", 64, 64)[:-20], "damaged"),
        (encoded("JPEG", 64, 64)[:-200], "damaged"),
        (bomb(30_000, 30_000), "pixels"),
        (bomb(MAX_SIDE + 1, 1), "side"),
    ],
    ids=["empty", "text", "gif", "bmp", "cut png", "cut jpeg", "bomb", "long"],
)
def test_what_is_no_image_is_refused_with_its_field(data, word):
    with pytest.raises(InvalidInput) as caught:
        check_upload(data, "inputs.image")
    assert caught.value.field == "inputs.image"
    assert word in caught.value.message


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]))
def test_any_bytes_are_an_image_or_a_clear_error(data, magic):
    with pytest.raises(InvalidInput) as caught:  # so few random bytes are never a picture
        check_upload(magic + data, "f")
    assert caught.value.field == "f"


def test_a_flipped_byte_anywhere_is_refused_or_does_no_harm():
    whole = encoded("PNG", 16, 16)
    refused: list[InvalidInput] = []
    for position in range(8, len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        try:
            check_upload(bytes(broken), "f")
        except InvalidInput as error:
            refused.append(error)
    assert len(refused) > len(whole) / 2


def test_png_bytes_are_those_of_pil():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert encode_png(to_image(pixels.reshape(-1), pixels.shape)) == buffer.getvalue()


class Watermark:
    """A hook for the tests below, named in the gateway's configuration."""

    def check_request(self, message) -> None:
        if "forbidden" in message.inputs["prompt"].text:
            raise InvalidInput("not here", field="inputs.prompt", reason="ContentFiltered")

    def process_image(self, image, context):
        if context.seed == 13:
            raise InvalidInput("no", reason="ContentFiltered")
        if context.seed == 14:
            raise ZeroDivisionError("oops")
        image.putpixel((0, 0), (1, 2, 3))
        return image


async def test_hooks_refuse_requests_and_change_pictures(tmp_path):
    config = replace(CONFIG, hooks=("test_pictures:Watermark",))
    node = one_node(tmp_path)
    async with gateway_over([node], config=config) as gateway:
        events = await events_of(gateway, request(previews=1))
        shown = [e.preview.png for e in events if e.WhichOneof("kind") == "preview"]
        for png in [*shown, images(events)[0].png]:
            with Image.open(io.BytesIO(png)) as picture:
                assert picture.getpixel((0, 0)) == (1, 2, 3)
        assert shown
        ran = len(node.assigned)
        with pytest.raises(InvalidInput) as caught:
            await events_of(gateway, request(prompt="a forbidden thing"))
        assert caught.value.reason == "ContentFiltered"
        assert len(node.assigned) == ran
        with pytest.raises(InvalidInput) as caught:
            await events_of(gateway, request(seed=13))
        assert caught.value.reason == "ContentFiltered"
        with pytest.raises(Internal) as broken:
            await events_of(gateway, request(seed=14))
        assert broken.value.reason == "HookFailed"
        assert_empty(gateway)


@pytest.mark.parametrize("name", ["nonsense", "no_such_module:x", "json:nothing", "json:dumps"])
def test_a_hook_that_is_none_is_named(name):
    with pytest.raises(InvalidInput) as caught:
        load_hooks(["test_pictures:Watermark", name])
    assert caught.value.field == "hooks[1]"


async def test_what_a_node_has_to_say_comes_with_the_picture_once(tmp_path):
    node = one_node(tmp_path)
    node.warnings["encode"] = ["only the beginning was read"]  # by each of three encoders
    async with gateway_over([node]) as gateway:
        (image,) = images(await events_of(gateway, request()))
        assert list(image.warnings) == ["only the beginning was read"]
        node.warnings.clear()
        (image,) = images(await events_of(gateway, request()))
        assert not image.warnings
