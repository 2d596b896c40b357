"""Compiled x86 programs: integer operators of `mq_ao`, everything around them fused by Inductor."""

from __future__ import annotations

from mq_ao.lowering.inductor.lower import (
    compile_float,
    compile_float_language_model,
    lower,
    lower_language_model,
    lower_module,
    rewrite,
)
from mq_ao.lowering.inductor.program import InductorModule, InductorProgram, load
from mq_ao.lowering.inductor.rewrite import INTEGER_KERNELS, count_integer_kernels

__all__ = [
    "INTEGER_KERNELS",
    "InductorModule",
    "InductorProgram",
    "compile_float",
    "compile_float_language_model",
    "count_integer_kernels",
    "load",
    "lower",
    "lower_language_model",
    "lower_module",
    "rewrite",
]
