"""Builds the kernels of a wheel: python -m mq_ao.ops.native.wheel FOLDER (see the Makefile's `wheel`)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from mq_ao.ops.native import build, prebuilt
from mq_ao.ops.native.shared_library import SharedLibrary, Toolkit


def _anywhere() -> Toolkit:
    """Without the place of this machine's PyTorch: where the kernels are loaded, it is loaded already."""
    made = build.library().toolkit()
    return replace(made, link=tuple(flag for flag in made.link if not flag.startswith("-Wl,-rpath")))


def library(level: prebuilt.Level) -> SharedLibrary:
    """The kernels for a level of instructions."""
    return replace(build.library(), arch=level.arch, toolkit=_anywhere)


def main(folder: Path) -> None:
    """Builds all levels of this machine's kind of processor."""
    for level in prebuilt.LEVELS:
        path = prebuilt.path_of(level, folder)
        print(f"building {path}", flush=True)
        library(level).write(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
