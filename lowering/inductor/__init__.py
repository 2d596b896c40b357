"""Compiled x86 programs: integer operators of `mq_ao`, everything around them fused by Inductor."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mq_ao.lowering.inductor.program import InductorModule, InductorProgram, load

if TYPE_CHECKING:
    from mq_ao.lowering.inductor.build import compiled, compiled_float, lower, lower_float, rewrite
    from mq_ao.lowering.inductor.kernels import KERNELS
    from mq_ao.lowering.inductor.rewriter import INTEGER_KERNELS

__all__ = [
    "INTEGER_KERNELS",
    "KERNELS",
    "InductorModule",
    "InductorProgram",
    "compiled",
    "compiled_float",
    "load",
    "lower",
    "lower_float",
    "rewrite",
]

_HOMES = {"INTEGER_KERNELS": "rewriter", "KERNELS": "kernels"}


def __getattr__(name: str) -> Any:
    # Loading a program should not wait for what makes one: quantizer, torchao and Inductor take seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'build')}"), name)
