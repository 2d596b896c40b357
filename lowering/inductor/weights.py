"""The weights in a `.pt2` archive: an entry in the safetensors format, read on the pages of the file."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.lowering import archive, tensor_file

ALL, REST = "mq_ao_weights.safetensors", "mq_ao_rest.safetensors"
"""Names of the entry: all weights, and what is left of them where they lie apart."""


def add(path: Path, weights: Mapping[str, Tensor], name: str = ALL) -> None:
    """Adds tensors to an archive, which is not complete without them."""
    with (
        path.open("r+b") as raw,
        zipfile.ZipFile(raw, "a", zipfile.ZIP_STORED) as file,
        file.open(f"{archive.root(file)}/{name}", "w", force_zip64=True) as entry,
    ):
        for part in tensor_file.parts(weights, at=raw.tell()):
            entry.write(part)


def mapped(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of an archive that was checked (see `archive.read_info`), where they lie in the file.

    Raises:
        MqAoError: the entry is missing, or is not what `add` writes.
    """
    try:
        tensors, _ = tensor_file.mapped(path, *_place(path, name))
    except archive.DAMAGE:
        raise MqAoError(f"the weights of {path} are damaged: copy or make it again.") from None
    return tensors


def _place(path: Path, name: str) -> tuple[int, int]:
    """Where an entry's content begins in the file, and its bytes."""
    with path.open("rb") as raw, zipfile.ZipFile(raw) as file:
        entry = file.getinfo(f"{archive.root(file)}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        raw.seek(entry.header_offset + 26)
        before = struct.unpack("<HH", raw.read(4))  # bytes of the name, and of what follows it
        return entry.header_offset + 30 + sum(before), entry.file_size
