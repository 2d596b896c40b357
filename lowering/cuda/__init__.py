"""Integer graphs for CUDA: int8 products, and float around them that Inductor fuses.

The graphs run on tensors of any device, and are tested on the CPU. Nothing here was run on a GPU.
"""

from __future__ import annotations

from mq_ao.lowering.cuda.device import require_cuda
from mq_ao.lowering.cuda.lower import lower
from mq_ao.lowering.cuda.rewrite import INTEGER_KERNELS

__all__ = ["INTEGER_KERNELS", "lower", "require_cuda"]
