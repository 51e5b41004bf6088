# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where an operator's own code looks at requests and pictures: safety checks, watermarks.

A hook is an object with one or both of these methods, named as "module:object" in the gateway's
configuration; a class is called without arguments first. They run in a worker thread, in order::

    class Watermark:
        def check_request(self, request): ...                # raise InvalidInput to refuse it
        def process_image(self, image, context): return image

Raise ``InvalidInput(..., reason="ContentFiltered")`` to withhold a request or a picture.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from kubediffusion.errors import Internal, InvalidInput, KubeDiffusionError
from kubediffusion.v1alpha1 import gateway_pb2


@dataclass(frozen=True, slots=True)
class ImageContext:
    """Which picture of which request; `preview` for one that is not finished."""

    request_id: str
    index: int
    seed: int
    workflow: str
    tenant: str
    preview: bool = False


@runtime_checkable
class RequestHook(Protocol):
    def check_request(self, request: gateway_pb2.GenerateRequest) -> None: ...


@runtime_checkable
class ImageHook(Protocol):
    def process_image(self, image: Image.Image, context: ImageContext) -> Image.Image: ...


class Hooks:
    """The hooks of one gateway, in order. Call from a worker thread."""

    def __init__(self, objects: Sequence[object] = ()) -> None:
        self._request = [hook for hook in objects if isinstance(hook, RequestHook)]
        self._image = [hook for hook in objects if isinstance(hook, ImageHook)]

    @property
    def checks_requests(self) -> bool:
        return bool(self._request)

    @property
    def processes_images(self) -> bool:
        return bool(self._image)

    def check_request(self, request: gateway_pb2.GenerateRequest) -> None:
        for hook in self._request:
            try:
                hook.check_request(request)
            except KubeDiffusionError:
                raise
            except Exception as error:
                raise _broken(hook, error) from error

    def process_image(self, image: Image.Image, context: ImageContext) -> Image.Image:
        for hook in self._image:
            try:
                image = hook.process_image(image, context)
            except KubeDiffusionError:
                raise
            except Exception as error:
                raise _broken(hook, error) from error
            if not isinstance(image, Image.Image):
                raise _broken(hook, TypeError("process_image must return a PIL image"))
        return image


def load_hooks(names: Sequence[str]) -> Hooks:
    """Imports each "module:object". Raises InvalidInput, field "hooks[i]", where that fails."""
    return Hooks([_load(name, f"hooks[{index}]") for index, name in enumerate(names)])


def _load(name: str, field: str) -> object:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InvalidInput(f'{name!r} is no hook: write "module:object"', field=field)
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        hook = found() if isinstance(found, type) else found
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"hook {name!r} cannot be loaded: {error}; "
            "is its package installed where the gateway runs?",
            field=field,
        ) from error
    if not isinstance(hook, RequestHook | ImageHook):
        raise InvalidInput(
            f"hook {name!r} has neither check_request nor process_image", field=field
        )
    return hook


def _broken(hook: object, error: Exception) -> Internal:
    """A request is refused rather than served unchecked."""
    return Internal(
        f"hook {type(hook).__name__} failed with {type(error).__name__}: {error}",
        reason="HookFailed",
    )
