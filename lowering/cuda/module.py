"""A module of any kind lowered for CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mq_ao.lowering.cuda.compiled import compiled
from mq_ao.lowering.cuda.program import CudaProgram
from mq_ao.lowering.cuda.saved import Mode, SavedGraph, parse_mode, placed, read, wanted_device, without_graphs
from mq_ao.lowering.module_program import ModuleProgram


class CudaModule(SavedGraph, ModuleProgram):
    """A module for GPUs. On the CPU it runs the operators' references, for checking and not for speed.

    Compiled, it serves all sizes that vary; there are no CUDA graphs, which are of one size. Not run on a GPU.

    Args:
        exported: of tensors alone; see `module_export.export_module`.
        info: what the program says of itself.
        device: where it runs; None: on the GPU if there is one, else on the CPU.
        mode: how; None: compiled on a GPU, eager on the CPU.

    Raises:
        MqAoError: a GPU was asked for and there is none that can run it, or the mode is unknown.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        info: Mapping[str, Any],
        device: torch.device | str | None = None,
        mode: Mode | str | None = None,
    ) -> None:
        wanted = wanted_device(device)
        super().__init__(info, wanted)
        self.mode = parse_mode(mode, Mode.DEFAULT if wanted.type == "cuda" else Mode.EAGER)
        self._exported = exported
        self._module = placed(exported, wanted)
        self._run: Any = self._module
        if self.mode is not Mode.EAGER:
            self._run = compiled(self._module, without_graphs(self.mode), dynamic=True)

    def on(self, device: torch.device | str, mode: Mode | str | None = None) -> CudaModule:
        """The same program on another device, with weights of its own there."""
        return CudaModule(self._exported, self._info, device, mode)

    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """See `ModuleProgram.run`."""
        with torch.no_grad():
            return self._run(*inputs)


def load(
    path: str | Path, device: torch.device | str | None = None, mode: Mode | str | None = None
) -> CudaProgram | CudaModule:
    """Loads a program saved by `save`, on a machine with or without a GPU.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version; or see the classes.
    """
    exported, info = read(Path(path))
    return (CudaModule if "signature" in info else CudaProgram)(exported, info, device, mode)
