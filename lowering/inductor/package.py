"""Reads the `.pt2` archives of compiled programs, which share one copy of the weights: that of the file, mapped."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mq_ao.ops
from mq_ao.compat.archives import Compiled
from mq_ao.lowering import archive
from mq_ao.lowering.inductor import weights as entries

FORMAT = 6
_PROGRAMS = "data/aotinductor"


@dataclass(frozen=True)
class Package:
    """A loaded archive.

    Attributes:
        programs: compiled programs by name; their weights are `weights`.
        weights: every tensor that the programs read, one copy.
        info: what the archive says of itself (JSON).
        path: the archive's file.
    """

    programs: Mapping[str, Compiled]
    weights: Mapping[str, Tensor]
    info: Mapping[str, Any]
    path: Path

    def copy(self, path: Path) -> None:
        """Writes the archive to another file."""
        shutil.copyfile(self.path, path)


def read_info(path: Path) -> dict[str, Any]:
    """What an archive says of itself.

    Raises:
        MqAoError: there is no such file, it is not one of ours, or another version wrote it.
    """
    return archive.read_info(path, platform())


def platform() -> dict[str, Any]:
    """What compiled code depends on."""
    return {"format": FORMAT, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def read(path: Path) -> Package:
    """Loads an archive written by `packaging.write`; the operators' native kernels are loaded or built first.

    Args:
        path: the file.

    Raises:
        MqAoError: see `read_info`.
    """
    info = read_info(path)
    mq_ao.ops.load_native()
    weights = entries.mapped(path)
    programs = {name: Compiled(path, name) for name in _names(path)}
    for program in programs.values():
        program.take({name: weights[name] for name in program.weight_names()})
    return Package(programs, weights, info, path)


def _names(path: Path) -> list[str]:
    """Of an archive's programs."""
    with zipfile.ZipFile(path) as file:
        inside = f"{archive.root(file)}/{_PROGRAMS}/"
        found = [name.removeprefix(inside).split("/")[0] for name in file.namelist() if name.startswith(inside)]
    return list(dict.fromkeys(found))
