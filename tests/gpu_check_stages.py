"""Stages for tests of `mq-ao gpu-check`: parts that end in every way there is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mq_ao.gpu_check.checks import CheckFailed, Skipped
from mq_ao.gpu_check.settings import Setting


def parts(setting: Setting, kinds: str, count: str = "") -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Parts by name, such as "fine dies": `count` is a file to which each run adds a line."""
    if kinds == "missing":
        raise ModuleNotFoundError("No module named 'torchao'")

    def run(kind: str) -> dict[str, Any]:
        if count:
            with Path(count).open("a") as file:
                file.write(f"{kind}\n")
        return _KINDS[kind]()

    return {kind: lambda kind=kind: run(kind) for kind in kinds.split()}


def _wrong() -> dict[str, Any]:
    raise CheckFailed("it is off by 3", {"off": 3.0})


def _raises() -> dict[str, Any]:
    raise RuntimeError("device-side assert")


def _skips() -> dict[str, Any]:
    raise Skipped("80 GB are needed")


def _hangs() -> dict[str, Any]:
    time.sleep(600)
    return {}


def _dies() -> dict[str, Any]:
    os.kill(os.getpid(), 11)
    return {}


_KINDS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "fine": lambda: {"value": 1},
    "also": lambda: {"value": 2},
    "wrong": _wrong,
    "raises": _raises,
    "skips": _skips,
    "hangs": _hangs,
    "dies": _dies,
}
