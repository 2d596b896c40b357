"""Native programs in a file: tensors in the safetensors format, with the plan and what the program says in its header.

Nothing in it depends on this machine or its PyTorch, and it holds no machine code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.files import replacing, write_atomically
from mq_ao.lowering import archive, tensor_file
from mq_ao.lowering.native.plan import Plan
from mq_ao.ops import library

FORMAT = 2
_NAME = "mq_ao_native"
"""Of the entry of the header."""


@dataclass(frozen=True)
class Saved:
    """A plan, and what it needs.

    Attributes:
        plan: the calls.
        weights: tensors that it reads, in its order.
        info: what the program says of itself (JSON).
    """

    plan: Plan
    weights: Mapping[str, Tensor]
    info: Mapping[str, Any]

    def bound(self) -> Any:
        """The plan, ready to run; the operators' native kernels are loaded or built first.

        Raises:
            MqAoError: there are no native kernels, or the steps do not fit together.
        """
        if not library.load_native():
            raise MqAoError(f"a native program needs the native kernels: {library.NativeState.failure}")
        return self.plan.bound(list(self.weights.values()))

    def write(self, path: Path) -> None:
        """Writes the file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        metadata = {_NAME: json.dumps({**self._described, "weights": list(self.weights)})}
        with replacing(path) as temporary, temporary.open("wb") as file:
            for part in tensor_file.parts(self.weights, metadata):
                file.write(part)

    def write_plan(self, path: Path) -> None:
        """Writes all but the weights, as JSON, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        shapes = {name: [list(item.shape), str(item.dtype)[6:]] for name, item in self.weights.items()}
        write_atomically(path, json.dumps({**self._described, "weights": shapes}).encode())

    @property
    def _described(self) -> dict[str, Any]:
        return {"format": FORMAT, "info": dict(self.info), "plan": self.plan.described}


def read(path: Path) -> Saved:
    """What `Saved.write` wrote; its weights lie on the pages of the file, and must not be written to.

    Raises:
        MqAoError: there is no such file, it is not one of ours or damaged, or another version wrote it.
    """
    if not path.is_file():
        raise MqAoError(f"there is no file {path}.")
    with undamaged(path):
        weights, metadata = tensor_file.mapped(path, 0, path.stat().st_size)
        described = json.loads(metadata[_NAME])
        return _saved(path, described, {str(name): weights[name] for name in described["weights"]})


def read_plan(path: Path) -> Saved:
    """What `Saved.write_plan` wrote, with weights on the meta device.

    Raises:
        MqAoError: the file is not one of ours or damaged, or another version wrote it.
    """
    with undamaged(path):
        described = json.loads(path.read_bytes())
        weights = {str(name): _empty(*what) for name, what in described["weights"].items()}
        return _saved(path, described, weights)


def _empty(shape: list[int], dtype: str) -> Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype} is no type of a tensor")
    return torch.empty(shape, dtype=kind, device="meta")


def _saved(path: Path, described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Saved:
    if described["format"] != FORMAT:
        raise MqAoError(
            f"{path} was saved in format {described['format']}, but this is {FORMAT}: quantize the model again "
            "with this mq_ao."
        )
    return Saved(Plan.read(described["plan"]), weights, dict(described["info"]))


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Says that a file is damaged where what it holds is not what a program needs.

    Raises:
        MqAoError: instead of what such contents raise.
    """
    try:
        yield
    except MqAoError:
        raise
    except archive.DAMAGE:
        raise MqAoError(
            f"{path} is not a program saved by mq_ao, or is damaged: make one with `mq-ao quantize`."
        ) from None
