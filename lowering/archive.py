"""What the archives of PyTorch programs (`.pt2`, `.ptc`) say of themselves."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mq_ao.errors import MqAoError

INFO = "mq_ao.json"
"""Name of the extra file in an archive."""

_DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError, OSError),
    # Of names, offsets, flags and methods that were hit:
    *(LookupError, TypeError, ValueError, OverflowError, RuntimeError),
)
"""What `zipfile` and `json` raise on bytes that are no archive of ours."""


def root(archive: zipfile.ZipFile) -> str:
    """The folder that everything in an archive lies in."""
    return archive.namelist()[0].split("/")[0]


def read_info(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What an archive says of itself.

    Args:
        path: the file.
        expected: what it must say, to run here.

    Raises:
        MqAoError: there is no such file, it is not one of ours or damaged, or it was saved elsewhere.
    """
    if not path.is_file():
        raise MqAoError(f"there is no file {path}.")
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                info = dict(json.loads(archive.read(f"{root(archive)}/extra/{INFO}")))
                damaged = archive.testzip()
        except _DAMAGE:
            raise MqAoError(f"{path} is not a program saved by mq_ao: make one with `mq-ao quantize`.") from None
    if damaged is not None:
        raise MqAoError(f"{path} is damaged at {damaged}: copy or make it again.")
    for key, here in expected.items():
        if info.get(key) != here:
            raise MqAoError(
                f"{path} was saved for {key} {info.get(key)}, but this is {here}: quantize the model again here."
            )
    return info
