"""The weights in a `.pt2` archive: an entry in the safetensors format, read on the pages of the file."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.lowering import archive

ALL, REST = "mq_ao_weights.safetensors", "mq_ao_rest.safetensors"
"""Names of the entry: all weights, and what is left of them where they lie apart."""
_LINE = 64
"""Bytes: tensors begin in the file where a line of the cache does."""
_LENGTH = 8
"""Bytes of the number before a header: its length."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES = {**_FLOATS, **_INTEGERS, "BOOL": torch.bool}


def add(path: Path, weights: Mapping[str, Tensor], name: str = ALL) -> None:
    """Adds tensors to an archive, which is not complete without them."""
    content = save(_untied(weights))
    begin = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    with (
        path.open("r+b") as raw,
        zipfile.ZipFile(raw, "a", zipfile.ZIP_STORED) as file,
        file.open(f"{archive.root(file)}/{name}", "w", force_zip64=True) as entry,
    ):
        spaces = -(raw.tell() + begin) % _LINE  # in which a header may end
        entry.write((begin - _LENGTH + spaces).to_bytes(_LENGTH, "little"))
        entry.write(content[_LENGTH:begin] + b" " * spaces)
        entry.write(memoryview(content)[begin:])


def mapped(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of an archive that was checked (see `archive.read_info`), where they lie in the file.

    Nothing is copied: pages are read when they are used, and processes share them. Nobody writes to them.

    Raises:
        MqAoError: the entry is missing, or is not what `add` writes.
    """
    try:
        begin, size = _place(path, name)
        file = torch.from_file(str(path), shared=False, size=begin + size, dtype=torch.uint8)
        return _tensors(file[begin:])
    except archive.DAMAGE:
        raise MqAoError(f"the weights of {path} are damaged: copy or make it again.") from None


def _place(path: Path, name: str) -> tuple[int, int]:
    """Where an entry's content begins in the file, and its bytes."""
    with path.open("rb") as raw, zipfile.ZipFile(raw) as file:
        entry = file.getinfo(f"{archive.root(file)}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        raw.seek(entry.header_offset + 26)
        before = struct.unpack("<HH", raw.read(4))  # bytes of the name, and of what follows it
        return entry.header_offset + 30 + sum(before), entry.file_size


def _tensors(content: Tensor) -> dict[str, Tensor]:
    """Views of what safetensors wrote, uint8 (bytes)."""
    begin = _LENGTH + int.from_bytes(bytes(content[:_LENGTH].tolist()), "little")
    header = json.loads(bytes(content[_LENGTH:begin].tolist()))
    header.pop("__metadata__", None)
    found = {}
    for name, item in header.items():
        first, end = item["data_offsets"]
        part = content[begin + first : begin + end]
        if first < 0 or len(part) != end - first:
            raise ValueError(f"{name} lies outside the file")
        found[name] = part.view(_DTYPES[item["dtype"]]).view(item["shape"])
    return found


def _untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; tied ones are written apart."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in weights.items():
        untied[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return untied
