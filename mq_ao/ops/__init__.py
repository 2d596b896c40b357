"""The operator dialect: importing this package registers every `torch.ops.mq_ao` operator.

Native kernels are used at once if they were built before; otherwise the first call builds them (see `library`).
"""

from mq_ao.ops import causal_conv1d, qcausal_conv1d, qlinear, selective_scan
from mq_ao.ops.library import load_cached, load_native, native_available, reference

load_cached()

__all__ = [
    "causal_conv1d",
    "load_cached",
    "load_native",
    "native_available",
    "qcausal_conv1d",
    "qlinear",
    "reference",
    "selective_scan",
]
