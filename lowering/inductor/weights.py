"""The weights in a `.pt2` archive: an entry in the safetensors format, read on the pages of the file."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.lowering import archive, tensor_file

NAME = "mq_ao_weights.safetensors"
"""Of the entry."""


def add(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Adds tensors to an archive, which is not complete without them."""
    with (
        path.open("r+b") as raw,
        zipfile.ZipFile(raw, "a", zipfile.ZIP_STORED) as file,
        file.open(f"{archive.root(file)}/{NAME}", "w", force_zip64=True) as entry,
    ):
        for part in tensor_file.parts(weights, at=raw.tell()):
            entry.write(part)


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive that was checked (see `archive.read_info`), where they lie in the file.

    Raises:
        MqAoError: the entry is missing, or is not what `add` writes.
    """
    try:
        tensors, _ = tensor_file.mapped(path, *_place(path))
    except archive.DAMAGE:
        raise MqAoError(f"the weights of {path} are damaged: copy or make it again.") from None
    return tensors


def _place(path: Path) -> tuple[int, int]:
    """Where the entry's content begins in the file, and its bytes."""
    with path.open("rb") as raw, zipfile.ZipFile(raw) as file:
        entry = file.getinfo(f"{archive.root(file)}/{NAME}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{NAME} is compressed")
        raw.seek(entry.header_offset + 26)
        before = struct.unpack("<HH", raw.read(4))  # bytes of the name, and of what follows it
        return entry.header_offset + 30 + sum(before), entry.file_size
