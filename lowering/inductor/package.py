"""Compiles graphs with AOTInductor into one `.pt2` archive whose programs share one copy of the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.export import ExportedProgram

import mq_ao.ops
from mq_ao.compat.archives import AOTICompiledModel, load_pt2, package_pt2, run
from mq_ao.compat.compiling import aot_compile
from mq_ao.lowering import archive
from mq_ao.lowering.language_graphs import INNER

FORMAT = 4
_WEIGHTS, _REST = "mq_ao_weights.safetensors", "mq_ao_rest.safetensors"
"""All weights, and what is left of them where they lie apart."""
# Weights stay out of the shared objects: all programs read one copy, and the file holds them once.
_OPTIONS: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}


@dataclass(frozen=True)
class Package:
    """A loaded archive.

    Attributes:
        programs: compiled programs by name; their weights are `weights`.
        weights: every tensor that the programs read, one copy.
        info: what the archive says of itself (JSON).
        path: the archive's file.
        complete: whether all weights lie in the file.
    """

    programs: Mapping[str, AOTICompiledModel]
    weights: Mapping[str, Tensor]
    info: Mapping[str, Any]
    path: Path
    complete: bool = True

    def run(self, name: str, *inputs: Tensor) -> list[Tensor]:
        """Outputs of one of the programs."""
        return run(self.programs[name], inputs)

    def copy(self, path: Path) -> None:
        """Writes the archive, complete, to another file."""
        shutil.copyfile(self.path, path)
        if not self.complete:
            _add_weights(path, self.weights)


def write(
    path: Path, programs: Mapping[str, ExportedProgram], info: Mapping[str, Any], apart: Collection[str] = ()
) -> None:
    """Compiles the programs and writes them, their weights and `info` to `path`, or writes nothing.

    Args:
        path: file to write, ending in `.pt2`; it is replaced in one step when everything is done.
        programs: exported programs by name.
        info: JSON-able description.
        apart: names of weights that are not written: whoever reads the archive has them.
    """
    weights: dict[str, Tensor] = {}
    described = json.dumps({**info, **platform()})
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        files: dict[str, Any] = {}
        for name, program in programs.items():
            files[name] = _compile(program, Path(folder) / name)
            for key, tensor in [*program.state_dict.items(), *program.constants.items()]:
                if isinstance(tensor, Tensor) and _own_name(key) not in apart:
                    weights[key] = tensor.detach().contiguous()
        archive_path = Path(folder) / path.name
        package_pt2(archive_path, aoti_files=files, extra_files={archive.INFO: described})
        _add_weights(archive_path, weights, _REST if apart else _WEIGHTS)
        archive_path.replace(path)


def _add_weights(path: Path, weights: Mapping[str, Tensor], name: str = _WEIGHTS) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(f"{archive.root(file)}/{name}", save_tensors(_untied(weights)))


def _compile(program: ExportedProgram, folder: Path) -> list[str]:
    """Compiles one program; returns what has to be shipped of it, in `folder`: no sources, and no symbols."""
    folder.mkdir()
    built = aot_compile(program.module(check_guards=False), *program.example_inputs, options=_OPTIONS)
    assert isinstance(built, list)
    files = []
    for file in built:
        if isinstance(file, str) and file.endswith((".so", ".json")):
            files.append(str(shutil.copy(file, folder)))
    strip = shutil.which("strip")
    if strip is not None:
        subprocess.run([strip, "--strip-unneeded", *(file for file in files if file.endswith(".so"))], check=True)
    return files


def read_info(path: Path) -> dict[str, Any]:
    """What an archive says of itself.

    Raises:
        MqAoError: there is no such file, it is not one of ours, or another version wrote it.
    """
    return archive.read_info(path, platform())


def platform() -> dict[str, Any]:
    """What compiled code depends on."""
    return {"format": FORMAT, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def read(path: Path, apart: Mapping[str, Tensor] = MappingProxyType({})) -> Package:
    """Loads an archive written by `write`; the operators' native kernels are loaded or built first.

    Args:
        path: the file.
        apart: the weights that it was written without.

    Raises:
        MqAoError: see `read_info`.
    """
    info = read_info(path)
    mq_ao.ops.load_native()
    with zipfile.ZipFile(path) as file:
        weights = load_tensors(file.read(f"{archive.root(file)}/{_REST if apart else _WEIGHTS}"))
    programs = load_pt2(str(path)).aoti_runners
    for program in programs.values():
        for name in program.get_constant_fqns():
            if name not in weights:
                weights[name] = apart[_own_name(name)]
        wanted = {name: weights[name] for name in program.get_constant_fqns()}
        program.load_constants(wanted, check_full_update=True, user_managed=True)
    return Package(programs, weights, info, path, complete=not apart)


def _own_name(name: str) -> str:
    """That of a weight in the graph that was exported."""
    return name.removeprefix(INNER)


def _untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; tied ones are written apart."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in weights.items():
        untied[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return untied
