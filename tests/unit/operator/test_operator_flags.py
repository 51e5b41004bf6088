# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from kubediffusion.errors import InvalidInput, NotFound
from kubediffusion_operator.flags import parse


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "operator.yaml"
    path.write_text("image: example/node:1\nnamespace: models\nlogJson: true\nhealthPort: 1234\n")
    return path


def test_the_file_is_read_and_flags_win(config: Path) -> None:
    options = parse(["--config", str(config)])
    assert options.config.namespace == "models"
    assert options.config.log_json is True
    assert options.config.health_port == 1234
    options = parse(
        ["--config", str(config), "--namespace", "", "--log-json", "false", "--health-port", "0"]
    )
    assert options.config.namespace == ""
    assert options.config.log_json is False
    assert options.config.health_port == 0
    assert options.config.image == "example/node:1"


def test_a_file_that_is_missing_or_wrong_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing.yaml cannot be read.*--config"):
        parse(["--config", str(tmp_path / "nothing.yaml")])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("image: x\ndebounce: 1\n")
    with pytest.raises(InvalidInput, match="debounceSeconds"):
        parse(["--config", str(wrong)])


@pytest.mark.parametrize(
    "flags", [["--health-port", "70000"], ["--log-json", "maybe"], ["--log-level", "LOUD"]]
)
def test_a_wrong_flag_ends_with_its_usage(
    flags: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--config", str(config), *flags])
    assert flags[1] in capsys.readouterr().err
