"""Compiled programs: of a language model, and of any module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.files import check_output, replacing
from mq_ao.lowering.inductor import package
from mq_ao.lowering.module_program import ModuleProgram
from mq_ao.lowering.stateful_program import StatefulProgram


class _Packaged:
    """A program in a `.pt2` archive."""

    _package: package.Package

    @property
    def weight_bytes(self) -> int:
        """Bytes of all resident weights and scales."""
        return sum(tensor.nbytes for tensor in self._package.weights.values())

    def save(self, path: str | Path) -> None:
        """Writes the program to a `.pt2` file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        with replacing(check_output(path, ".pt2")) as temporary:
            self._package.copy(temporary)


class InductorProgram(_Packaged, StatefulProgram):
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
            MqAoError: the file is missing, damaged, not ours, of another version, or not a language model's.
        """
        program = load(path)
        if not isinstance(program, cls):
            raise MqAoError(f"{path} is not the program of a language model: load it with mq_ao.load.")
        return program

    def run(self, name: str, *inputs: Tensor) -> Sequence[Tensor]:
        """See `StatefulProgram.run`."""
        return self._package.programs[name](inputs)


class InductorModule(_Packaged, ModuleProgram):
    """A module compiled by AOTInductor.

    Args:
        loaded: archive with the program `forward`.
    """

    def __init__(self, loaded: package.Package) -> None:
        super().__init__(loaded.info)
        self._package = loaded

    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """See `ModuleProgram.run`."""
        return self._package.programs["forward"](inputs)


def load(path: str | Path) -> InductorProgram | InductorModule:
    """Loads a program saved by `save`, in this or another process.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version.
    """
    loaded = package.read(Path(path))
    return InductorModule(loaded) if "signature" in loaded.info else InductorProgram(loaded)
