"""Programs without a compiler: operators of `mq_ao` and PyTorch's own, called one after another from C++."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mq_ao.lowering.native.program import NativeModule, NativeProgram, load

if TYPE_CHECKING:
    from mq_ao.lowering.native.build import lower, lower_float, rewrite
    from mq_ao.lowering.native.kernels import KERNELS
    from mq_ao.lowering.native.rewriter import INTEGER_KERNELS

__all__ = [
    "INTEGER_KERNELS",
    "KERNELS",
    "NativeModule",
    "NativeProgram",
    "load",
    "lower",
    "lower_float",
    "rewrite",
]

_HOMES = {"INTEGER_KERNELS": "rewriter", "KERNELS": "kernels"}


def __getattr__(name: str) -> Any:
    # Loading a program should not wait for what makes one: quantizer and torchao take seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'build')}"), name)
