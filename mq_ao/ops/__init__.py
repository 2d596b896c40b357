"""The operator dialect: importing this package registers every `torch.ops.mq_ao` operator.

Native kernels are used at once if they were built before; otherwise the first call builds them (see `library`).
"""

from mq_ao.ops import (
    causal_conv1d,
    gate,
    gpu,
    grids,
    hadamard,
    hadamard_matrix,
    in_place,
    int8_gate,
    int8_linear,
    int8_rms_norm,
    int8_rows,
    int8_steps,
    nibbles,
    operator,
    packing,
    qcausal_conv1d,
    qgate,
    qlinear,
    qselective_scan,
    qssd_scan,
    scan_states,
    selective_scan,
    ssd_scan,
    state,
    weight_linear,
    wlinear,
)
from mq_ao.ops.library import load_cached, load_native, native_available

load_cached()

__all__ = [
    "causal_conv1d",
    "gate",
    "gpu",
    "grids",
    "hadamard",
    "hadamard_matrix",
    "in_place",
    "int8_gate",
    "int8_linear",
    "int8_rms_norm",
    "int8_rows",
    "int8_steps",
    "load_cached",
    "load_native",
    "native_available",
    "nibbles",
    "operator",
    "packing",
    "qcausal_conv1d",
    "qgate",
    "qlinear",
    "qselective_scan",
    "qssd_scan",
    "scan_states",
    "selective_scan",
    "ssd_scan",
    "state",
    "weight_linear",
    "wlinear",
]
