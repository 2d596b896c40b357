"""Native kernels that came with the wheel, built ahead for several levels of a processor's instructions."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

NAME = "libmq_ao_ops.so"
FOLDER = Path(__file__).parent / "prebuilt"
"""Where a wheel has them; there is none in a checkout."""


@dataclass(frozen=True)
class Level:
    """Instructions that kernels are built for.

    Attributes:
        name: of the level.
        arch: flags of the compiler.
        needs: what a processor must have, by the names of Linux.
    """

    name: str
    arch: str
    needs: frozenset[str]


_AVX2 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}
_X86 = (
    Level("amx", "-march=x86-64-v4 -mavx512vnni -mamx-tile -mamx-int8", _VNNI | {"amx_tile", "amx_int8"}),
    Level("avx512-vnni", "-march=x86-64-v4 -mavx512vnni", _VNNI),
    Level("avx512", "-march=x86-64-v4", _AVX512),
    Level("avx2", "-march=x86-64-v3", _AVX2),
)
_ARM = (Level("dotprod", "-march=armv8.2-a+dotprod", frozenset({"asimd", "asimddp"})),)
LEVELS = _ARM if platform.machine() in ("aarch64", "arm64") else _X86
"""Best first."""


def found() -> str | None:
    """Path of the kernels of the best level that this processor has, for this PyTorch; None: there are none."""
    if not FOLDER.is_dir():
        return None
    able = _instructions()
    paths = (path_of(level, FOLDER) for level in LEVELS if level.needs <= able)
    return next((str(path) for path in paths if path.is_file()), None)


def path_of(level: Level, folder: Path) -> Path:
    """Where the kernels of a level lie in a folder of them: PyTorch promises nothing across its minor versions."""
    major, minor = torch.__version__.split(".")[:2]
    return folder / f"torch-{major}.{minor}" / level.name / NAME


def _instructions() -> frozenset[str]:
    """What this processor has, by the names of Linux; empty where that does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(listed.partition(":")[2].split())
