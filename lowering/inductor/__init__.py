"""Compiled x86 programs: integer operators of `mq_ao`, everything around them fused by Inductor."""

from __future__ import annotations

from mq_ao.lowering.inductor.kernels import KERNELS
from mq_ao.lowering.inductor.lower import compiled, compiled_float, lower, lower_float, portable, rewrite
from mq_ao.lowering.inductor.program import InductorModule, InductorProgram, load
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
    "portable",
    "rewrite",
]
