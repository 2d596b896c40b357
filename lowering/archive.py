"""What the archives of PyTorch programs (`.pt2`, `.ptc`) say of themselves."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mq_ao.errors import MqAoError
from mq_ao.files import replacing

INFO = "mq_ao.json"
"""Name of the extra file in an archive."""

DAMAGE = (
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
        except DAMAGE:
            raise MqAoError(f"{path} is not a program saved by mq_ao: make one with `mq-ao quantize`.") from None
    if damaged is not None:
        raise MqAoError(f"{path} is damaged at {damaged}: copy or make it again.")
    for key, here in expected.items():
        if info.get(key) != here:
            raise MqAoError(
                f"{path} was saved for {key} {info.get(key)}, but this is {here}: quantize the model again here."
            )
    return info


def versions(kind: str, number: int) -> dict[str, Any]:
    """What a saved graph depends on: its format and PyTorch, but not on how that was built, nor on the processor."""
    return {kind: number, "torch": torch.__version__.split("+")[0]}


def write_graph(path: Path, exported: ExportedProgram, info: Mapping[str, Any]) -> None:
    """Writes a graph, and what the file is to say, under a temporary name that is renamed when it is complete.

    Raises:
        MqAoError: the path cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.export.save(exported, file, extra_files={INFO: json.dumps(dict(info))})


def read_graph(path: Path, expected: Mapping[str, Any]) -> tuple[ExportedProgram, dict[str, Any]]:
    """The graph of a file, and what the file says of itself.

    Raises:
        MqAoError: see `read_info`.
    """
    info = read_info(path, expected)
    # transformers reads within a context in which tensors have no values.
    with path.open("rb") as file, torch.device("cpu"):
        return torch.export.load(file), info
