"""Tensors in the safetensors format, read on the pages of the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

_LINE = 64
"""Bytes: tensors begin in the file where a line of the cache does."""
_LENGTH = 8
"""Bytes of the number before a header: its length."""
_METADATA = "__metadata__"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES = {**_FLOATS, **_INTEGERS, "BOOL": torch.bool}


def parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, at: int = 0
) -> Iterator[bytes | memoryview]:
    """What to write, in order, where the first byte will lie at byte `at` of its file."""
    content = save(_untied(tensors), None if metadata is None else dict(metadata))
    begin = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    spaces = -(at + begin) % _LINE  # in which a header may end
    yield (begin - _LENGTH + spaces).to_bytes(_LENGTH, "little")
    yield content[_LENGTH:begin] + b" " * spaces
    yield memoryview(content)[begin:]


def mapped(path: Path, begin: int, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and the metadata, that lie in a file from byte `begin` on, `size` bytes of it.

    Nothing is copied: pages are read when they are used, and processes share them. Nobody writes to them.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError: this is not what `parts` gives.
    """
    if size < _LENGTH:
        raise ValueError("there is no header")
    content = torch.from_file(str(path), shared=False, size=begin + size, dtype=torch.uint8)[begin:]
    start = _LENGTH + int.from_bytes(bytes(content[:_LENGTH].tolist()), "little")
    if start > size:
        raise ValueError("the header ends outside the file")
    header = json.loads(content[_LENGTH:start].numpy().tobytes())
    metadata = header.pop(_METADATA, {})
    return {name: _tensor(name, item, content[start:]) for name, item in header.items()}, metadata


def _tensor(name: str, item: Mapping[str, Any], content: Tensor) -> Tensor:
    first, end = item["data_offsets"]
    part = content[first:end]
    if first < 0 or len(part) != end - first:
        raise ValueError(f"{name} lies outside the file")
    return part.view(_DTYPES[item["dtype"]]).view(item["shape"])


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; tied ones are written apart."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in tensors.items():
        untied[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return untied
