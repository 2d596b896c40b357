"""A compiled language model: prefill, decode, generation, saving and loading."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from mq_ao.files import check_output, replacing
from mq_ao.lowering.inductor import package
from mq_ao.lowering.program import StatefulProgram, States


class InductorProgram(StatefulProgram):
    """A language model compiled by AOTInductor: one program for any length, one for a single token.

    Args:
        loaded: archive with the programs `prefill` and `decode`.
    """

    def __init__(self, loaded: package.Package) -> None:
        super().__init__(loaded.info)
        self._package = loaded

    @classmethod
    def load(cls, path: str | Path) -> InductorProgram:
        """Loads a program saved by `save`, in this or another process.

        Raises:
            MqAoError: the file is missing, damaged, not ours, or of another version.
        """
        return cls(package.read(Path(path)))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all resident weights and scales."""
        return sum(tensor.nbytes for tensor in self._package.weights.values())

    def run(self, name: str, *inputs: Tensor) -> States:
        """See `StatefulProgram.run`."""
        logits, conv, ssm = self._package.programs[name](*inputs)
        return logits, conv, ssm

    def save(self, path: str | Path) -> None:
        """Writes the program to a `.pt2` file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        with replacing(check_output(path, ".pt2")) as temporary:
            shutil.copyfile(self._package.path, temporary)
