"""Compiles graphs with AOTInductor into one `.pt2` archive whose programs share one copy of the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from mq_ao.compat.compiling import aot_compile, package_pt2
from mq_ao.lowering import archive
from mq_ao.lowering.inductor import weights as entries
from mq_ao.lowering.inductor.package import platform

# Weights stay out of the shared objects: all programs read one copy, and the file holds them once.
_OPTIONS: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}


def write(path: Path, programs: Mapping[str, ExportedProgram], info: Mapping[str, Any]) -> None:
    """Compiles the programs and writes them, their weights and `info` to `path`, or writes nothing.

    Args:
        path: file to write, ending in `.pt2`; it is replaced in one step when everything is done.
        programs: exported programs by name.
        info: JSON-able description.
    """
    weights: dict[str, Tensor] = {}
    described = json.dumps({**info, **platform()})
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        files: dict[str, Any] = {}
        for name, program in programs.items():
            files[name] = _compile(program, Path(folder) / name)
            for key, tensor in [*program.state_dict.items(), *program.constants.items()]:
                if isinstance(tensor, Tensor):
                    weights[key] = tensor.detach().contiguous()
        archive_path = Path(folder) / path.name
        package_pt2(archive_path, aoti_files=files, extra_files={archive.INFO: described})
        entries.add(archive_path, weights)
        archive_path.replace(path)


def _compile(program: ExportedProgram, folder: Path) -> list[str]:
    """Compiles one program; returns what has to be shipped of it, in `folder`: no sources, and no symbols.

    The loader of torch 2.11 finds a program by the name of its source, so that file is there, and empty.
    """
    folder.mkdir()
    built = aot_compile(program.module(check_guards=False), *program.example_inputs, options=_OPTIONS)
    assert isinstance(built, list)
    files = []
    for file in built:
        if isinstance(file, str) and file.endswith((".so", ".json")):
            files.append(str(shutil.copy(file, folder)))
        if isinstance(file, str) and file.endswith(".wrapper.so"):
            source = folder / Path(file).with_suffix(".cpp").name
            source.touch()
            files.append(str(source))
    strip = shutil.which("strip")
    if strip is not None:
        subprocess.run([strip, "--strip-unneeded", *(file for file in files if file.endswith(".so"))], check=True)
    return files
