"""The text of the demo model: Python's standard library, with some modules held out."""

from __future__ import annotations

import logging
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HELD_OUT = (
    "csv",
    "fractions",
    "graphlib",
    "heapq",
    "sched",
    "shlex",
    "statistics",
    "tempfile",
    "textwrap",
    "zipapp",
)
"""Modules that are never trained on, nor are their tests: 202 kB in Python 3.11, varied in subject."""

CALIBRATION = ("calendar", "cmd", "selectors", "shelve")
"""Modules that are trained on and shipped as calibration text."""

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "_bundled"})

EXCLUDED_FILES = (
    # Wrong encodings on purpose, or no text.
    "lib2to3/tests/data/*",
    "test/bad*.py",
    "test/tokenizedata/*",
    "test/encoded_modules/*",
)

NO_MODULES = ("test/*", "*/test/*", "*/tests/*", "*/idle_test/*", "encodings/*", "pydoc_data/*")
"""Tests, and tables of characters and help texts: most of the bytes, and unlike other modules."""


@dataclass(frozen=True)
class Corpus:
    """Documents as bytes.

    Attributes:
        train: training documents in a fixed order.
        modules: those of `train` that are no tests and no tables: what the held-out documents are like.
        heldout: held-out documents, one a module of `HELD_OUT`.
        calibration: documents of `CALIBRATION`, also in `train`.
    """

    train: list[bytes]
    modules: list[bytes]
    heldout: list[bytes]
    calibration: list[bytes]


def tests_held_out(path: str) -> bool:
    """Whether `path` (relative, with slashes) is a test of a held-out module."""
    parts = path.split("/")
    if "test" not in parts[:-1]:
        return False
    stems = [part.removesuffix(".py") for part in parts]
    return any(stem == f"test_{name}" or stem.startswith(f"test_{name}_") for stem in stems for name in HELD_OUT)


def collect(root: Path | None = None) -> Corpus:
    """Reads the standard library under `root` (the running interpreter's if None).

    Raises:
        FileNotFoundError: a held-out or calibration module is missing there.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    train, modules = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if EXCLUDED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            continue
        if name.removesuffix(".py") in HELD_OUT or tests_held_out(name):
            continue
        if any(fnmatch(name, pattern) for pattern in EXCLUDED_FILES):
            continue
        content = path.read_bytes()
        if content and is_text(content):
            train.append(content)
            if not any(fnmatch(name, pattern) for pattern in NO_MODULES):
                modules.append(content)
    return Corpus(
        train=train,
        modules=modules,
        heldout=[(root / f"{name}.py").read_bytes() for name in HELD_OUT],
        calibration=[(root / f"{name}.py").read_bytes() for name in CALIBRATION],
    )


def is_text(content: bytes) -> bool:
    """Whether a file is UTF-8 without zero bytes."""
    if 0 in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def repeated_lines(train: list[bytes], heldout: list[bytes], shortest: int = 30) -> float:
    """Share of the held-out bytes in lines of `shortest` characters or more that are trained on too."""
    seen = {line.strip() for document in train for line in document.splitlines()}
    lines = [line.strip() for document in heldout for line in document.splitlines()]
    repeated = sum(len(line) for line in lines if len(line) >= shortest and line in seen)
    return repeated / max(1, sum(len(line) for line in lines))


def joined(documents: list[bytes]) -> Tensor:
    """Documents as one text, uint8, with a 0 byte before and after each."""
    return torch.frombuffer(bytearray(b"\0" + b"\0".join(documents) + b"\0"), dtype=torch.uint8)
