# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway that begins with what `kubediffusion profile` measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from gateways import CONFIG

from kubediffusion.errors import InvalidInput
from kubediffusion.gateway.core import Gateway

ROW = {"model": "m", "stage": "encode", "fingerprint": "f", "units": 1.0, "seconds": 0.5}


def write(folder, content) -> None:
    (folder / "model_profiles.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


@pytest.mark.parametrize("name", ["", "model_profiles.json"])
async def test_a_folder_or_its_file_gives_the_first_estimates(tmp_path, name):
    write(tmp_path, {"stages": [ROW]})
    gateway = Gateway(replace(CONFIG, profiles=tmp_path / name))
    assert gateway.profiles.run_seconds("m", "encode", "f", 1.0) == 0.5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ({"models": {}}, "KeyError: 'stages'"),
        ({"stages": [{**ROW, "seconds": -1}]}, "-1 s"),
    ],
)
async def test_what_is_no_profile_is_said_at_the_start(tmp_path, content, says):
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(InvalidInput, match=says) as raised:
        Gateway(replace(CONFIG, profiles=tmp_path))
    assert raised.value.field == "profiles"
