"""Converted graph in, runnable program out: one package a backend, and what they share."""

from __future__ import annotations

from typing import Any

from mq_ao.backends import BACKENDS


def __getattr__(name: str) -> Any:
    # The package of a backend is imported when it is used.
    if name in BACKENDS:
        return BACKENDS[name].lowering
    raise AttributeError(f"module 'mq_ao.lowering' has no attribute {name!r}")
