"""Programs that need no compiler: a plan that runs on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mq_ao.backends import NATIVE
from mq_ao.errors import MqAoError, first_line
from mq_ao.files import check_output
from mq_ao.lowering.module_program import ModuleProgram
from mq_ao.lowering.native import file
from mq_ao.lowering.stateful_program import StatefulProgram

_FIRST = torch.zeros(1, dtype=torch.int64)
"""Position of the one token of a step."""


class _Planned:
    """A program whose plan may be saved.

    Attributes:
        saved: what a file of it holds.
    """

    saved: file.Saved

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and scales."""
        return sum(tensor.nbytes for tensor in self.saved.weights.values())

    def save(self, path: str | Path) -> None:
        """Writes the program to a `.ptn` file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        self.saved.write(check_output(path, NATIVE.suffix))


class NativeProgram(_Planned, StatefulProgram):
    """A language model: one plan for prefill and decode, of any batch and length.

    Args:
        saved: a plan `(input_ids, *states, positions) -> (logits, *states)`.
        bound: `saved`, ready to run.
    """

    def __init__(self, saved: file.Saved, bound: Any) -> None:
        super().__init__(saved.info)
        self.saved, self._bound = saved, bound

    def run(self, name: str, *inputs: Tensor) -> Sequence[Tensor]:
        """See `StatefulProgram.run`."""
        return self._bound.run([*inputs, _FIRST] if name == "decode" else list(inputs))


class NativeModule(_Planned, ModuleProgram):
    """A module.

    Args:
        saved: a plan of its forward pass.
        bound: `saved`, ready to run.
    """

    def __init__(self, saved: file.Saved, bound: Any) -> None:
        super().__init__(saved.info)
        self.saved, self._bound = saved, bound

    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """See `ModuleProgram.run`."""
        return self._bound.run(list(inputs))


def program(saved: file.Saved) -> NativeProgram | NativeModule:
    """The program of a plan.

    Raises:
        MqAoError: there are no native kernels for this machine, or the plan's steps do not fit together.
    """
    try:
        bound = saved.bound()
    except RuntimeError as error:
        raise MqAoError(f"the program does not fit this mq_ao and PyTorch: {first_line(error)}") from error
    return NativeModule(saved, bound) if "signature" in saved.info else NativeProgram(saved, bound)


def load(path: str | Path) -> NativeProgram | NativeModule:
    """Loads a program saved by `save`, on any machine whose kernels there are.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version; or see `program`.
    """
    path = Path(path)
    saved = file.read(path)
    with file.undamaged(path):
        return program(saved)
