"""An exported graph in a file, put on the device that runs it, and the ways to run it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

import mq_ao.ops  # noqa: F401  (the operators of saved graphs)
from mq_ao.backends import CUDA
from mq_ao.errors import MqAoError
from mq_ao.files import check_output
from mq_ao.graph import walk
from mq_ao.lowering import archive
from mq_ao.lowering.cuda.device import require_cuda

FORMAT = 2
_VERSIONS = archive.versions("cuda_format", FORMAT)


class Mode(StrEnum):
    """How a program runs."""

    EAGER = "eager"
    DEFAULT = "default"
    CUDA_GRAPHS = "reduce-overhead"
    MAX_AUTOTUNE = "max-autotune"


WITH_GRAPHS = (Mode.CUDA_GRAPHS, Mode.MAX_AUTOTUNE)


def parse_mode(mode: Mode | str | None, default: Mode) -> Mode:
    """A mode by name; None: the default.

    Raises:
        MqAoError: there is none of that name.
    """
    if mode is None:
        return default
    try:
        return Mode(mode)
    except ValueError:
        known = ", ".join(item.value for item in Mode)
        raise MqAoError(f"unknown mode {mode!r}: the modes are {known}.") from None


def without_graphs(mode: Mode) -> str:
    """For lengths that vary: a CUDA graph is of one size."""
    return "max-autotune-no-cudagraphs" if mode is Mode.MAX_AUTOTUNE else "default"


def wanted_device(device: torch.device | str | None) -> torch.device:
    """A device that runs a program; None: the GPU if there is one, else the CPU.

    Raises:
        MqAoError: a GPU was asked for and there is none that can run it.
    """
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda":
        require_cuda(wanted)
    return wanted


def placed(exported: ExportedProgram, device: torch.device) -> GraphModule:
    """The graph, on a device."""
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    # They hold the device on which the graph was exported.
    for node in walk.calls(module, {torch.ops.aten._assert_tensor_metadata.default}):
        module.graph.erase_node(node)
    module.recompile()
    # Moving a module moves its parameters, which are the exported program's too.
    return module if device.type == "cpu" else copy.deepcopy(module).to(device)


class SavedGraph:
    """What programs of such graphs have in common: their weights, their device and their file."""

    _exported: ExportedProgram
    _module: GraphModule
    _info: Mapping[str, Any]
    _device: torch.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all resident weights and scales."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def save(self, path: str | Path) -> None:
        """Writes the program to a `.ptc` file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        archive.write_graph(check_output(path, CUDA.suffix), self._exported, {**self._info, **_VERSIONS})


def read(path: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """The graph of a file, and what the file says of itself.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version.
    """
    return archive.read_graph(path, _VERSIONS)
