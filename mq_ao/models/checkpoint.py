"""Reading the weights of a model folder; nothing in it is ever executed."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models.names import renamed, unwrapped

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights are looked for; the first that exists is read."""


def has_weights(folder: Path) -> bool:
    """Whether one of `FILES` is there."""
    return any((folder / name).is_file() for name in FILES)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of `folder` by name, floating-point ones in float32.

    Files are read one after the other, and a weight is converted before the next is read: what is stored in half
    precision is never in memory as a whole beside what is returned.

    Raises:
        MqAoError: there are none, or a file is missing, cut off, broken or not a plain table of tensors.
    """
    for name in FILES:
        path = folder / name
        if path.is_file():
            return _read_shards(path) if name.endswith(".index.json") else read_file(path)
    raise MqAoError(f"{folder} has no weights: one of {', '.join(FILES)} has to be there.")


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MqAoError(f"{index} is no index of weights ({error!r}): fetch it again.") from error
    # A shard lies beside its index: an index that points elsewhere is not followed.
    for name in map(str, names):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise MqAoError(f"{index} names {name}, and there is no such file beside it: fetch it.")
    weights: dict[str, Tensor] = {}
    for name in sorted(map(str, names)):
        weights |= read_file(index.parent / name)
    return weights


def read_file(path: Path) -> dict[str, Tensor]:
    """All weights of a file, floating-point ones in float32, by the names of the model without what wraps it.

    Of a training checkpoint they are those under "model" or "state_dict".

    Raises:
        MqAoError: it is cut off, broken or not a plain table of tensors.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    weights = read(path)
    try:
        return renamed(weights, unwrapped)
    except MqAoError as error:
        raise MqAoError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            return {name: _float32(file.get_tensor(name)) for name in names}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise MqAoError(f"{path} is cut off or broken ({error}): fetch it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    # Pages of a mapped file are not memory of this process; what older versions of torch wrote cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        # Training scripts keep their options beside the weights; a Namespace holds data alone.
        with torch.serialization.safe_globals([argparse.Namespace]):
            values: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise MqAoError(
            f"{path} is broken or holds more than tensors, which is never executed "
            f"({_first_sentence(error)}): fetch it again, or ask for the model as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise MqAoError(f"{path} is cut off or broken ({_first_sentence(error)}): fetch it again.") from error
    if isinstance(values, dict):
        values = next((values[key] for key in ("model", "state_dict") if isinstance(values.get(key), dict)), values)
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    ):
        raise MqAoError(f"{path} is not a table of tensors by name: give a model's state_dict.")
    # Copied: a training script may write the file anew while the model is in use.
    return {name: _float32(values.pop(name), copy=mapped) for name in list(values)}


def _float32(weight: Tensor, *, copy: bool = False) -> Tensor:
    """The weight in float32; integers as they are, for an error that names them."""
    return weight.to(torch.float32 if weight.is_floating_point() else weight.dtype, copy=copy)


def _first_sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
