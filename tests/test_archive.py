"""Archives of programs that were damaged on their way."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from mq_ao import MqAoError
from mq_ao.lowering import archive


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A small archive."""
    path = tmp_path / "whole.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"program/extra/{archive.INFO}", json.dumps({"torch": "2"}))
        file.writestr("program/data", bytes(range(8)))
    assert archive.read_info(path, {"torch": "2"}) == {"torch": "2"}
    return path.read_bytes()


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_whichever_byte_is_flipped_the_file_is_named_or_reads_as_before(
    content: bytes, flip: int, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.pt2"
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            # times and attributes of files are not read
            assert archive.read_info(path, {}) == {"torch": "2"}, place
        except MqAoError as error:
            assert "damaged.pt2 is " in str(error)
            refused += 1
    assert refused > len(content) / 2


@pytest.mark.parametrize("info", ["[1, 2]", "7", "null", "{", "\\ud800"])
def test_what_is_no_description_is_refused(info: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"program/extra/{archive.INFO}", info)
    with pytest.raises(MqAoError, match="not a program saved by mq_ao"):
        archive.read_info(path, {})
