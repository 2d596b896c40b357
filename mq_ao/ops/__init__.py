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
    int8_rms_norm,
    int8_rows,
    int8_steps,
    linear_packed,
    linear_packed_weight_only,
    linear_rows,
    linear_rows_weight_only,
    nibbles,
    operator,
    packing,
    qcausal_conv1d,
    qgate,
    qselective_scan,
    qssd_scan,
    scan_states,
    selective_scan,
    ssd_scan,
    state,
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
    "int8_rms_norm",
    "int8_rows",
    "int8_steps",
    "linear_packed",
    "linear_packed_weight_only",
    "linear_rows",
    "linear_rows_weight_only",
    "load_cached",
    "load_native",
    "native_available",
    "nibbles",
    "operator",
    "packing",
    "qcausal_conv1d",
    "qgate",
    "qselective_scan",
    "qssd_scan",
    "scan_states",
    "selective_scan",
    "ssd_scan",
    "state",
]
