"""Integer graphs and programs for CUDA: our operators on Triton kernels, `aten._int_mm`, and Inductor around them.

The graphs run on tensors of any device, and are tested on the CPU. Nothing here was run on a GPU.
"""

from __future__ import annotations

from mq_ao.lowering.cuda.compiled import compiled
from mq_ao.lowering.cuda.device import require_cuda
from mq_ao.lowering.cuda.kernels import KERNELS
from mq_ao.lowering.cuda.lower import lower, lower_float, program_of, rewrite
from mq_ao.lowering.cuda.module import CudaModule, load
from mq_ao.lowering.cuda.program import CudaProgram
from mq_ao.lowering.cuda.rewriter import INTEGER_KERNELS
from mq_ao.lowering.cuda.saved import Mode

__all__ = [
    "INTEGER_KERNELS",
    "KERNELS",
    "CudaModule",
    "CudaProgram",
    "Mode",
    "compiled",
    "load",
    "lower",
    "lower_float",
    "program_of",
    "require_cuda",
    "rewrite",
]
