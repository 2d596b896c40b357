"""`mq_ao::qssd_scan`: the recurrence of `mq_ao::ssd_scan` on 8-bit operands (docs/method.md, section 5).

Operands and outputs are read and written as integers; softplus, decays, recurrence and states are float32. Step sizes
are quantized before the softplus, never after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import Grid, check_grids, dequantize, output_dtype, requantize
from mq_ao.ops.operator import Operands, like, operator
from mq_ao.ops.ssd_scan import check_shapes, last_state_of, ssd_scan


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    out = check_grids("qssd_scan", a, ("x", "dt", "B", "C"))
    check_shapes(a)
    return like(a.x, dtype=output_dtype(a.x, out)), last_state_of(a, torch.float32)


@operator(results=_results)
def qssd_scan(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    dt: Tensor,
    dt_scale: float,
    dt_zero_point: int,
    A: Tensor,
    B: Tensor,
    B_scale: float,
    B_zero_point: int,
    C: Tensor,
    C_scale: float,
    C_zero_point: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of the dequantized operands, then rounding.

    Each of x, dt, B and C is uint8 or int8, of value `(q - zero_point) * scale` in float32, or float32, when its scale
    and zero point are not looked at. Zero points lie within the operand's dtype.

    Args:
        x: (batch, length, heads, headdim).
        x_scale, x_zero_point: grid of x; the following operands' likewise.
        dt: (batch, length, heads), step sizes before bias, softplus and limits.
        dt_scale, dt_zero_point: grid of dt.
        A: (heads,), negative real.
        B: (batch, length, groups, d_state), where head h reads group `h // (heads // groups)`.
        B_scale, B_zero_point: grid of B.
        C: like B.
        C_scale, C_zero_point: grid of C.
        D: (heads,) or (heads, headdim), the skip connection; it multiplies the dequantized x.
        dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx: as in `ssd_scan`.
        out_scale: None for float32 output; else y is rounded as by `quantized_decomposed.quantize_per_tensor`.
        out_zero_point: within y's dtype.

    Returns:
        y (batch, length, heads, headdim), float32, or with `out_scale` int8 where x is int8 and else uint8; and the
        state after the last step (batch, heads, headdim, d_state), float32. Both contiguous.

    Raises:
        MqAoError: types, shapes or grids do not fit together, or the length is 0.
    """
    values, step = dequantize(x, Grid(x_scale, x_zero_point)), dequantize(dt, Grid(dt_scale, dt_zero_point))
    b, c = dequantize(B, Grid(B_scale, B_zero_point)), dequantize(C, Grid(C_scale, C_zero_point))
    rest = (D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx)
    y, last_state = ssd_scan.reference(values, step, A, b, c, *rest)
    out = Grid(out_scale, out_zero_point)
    return requantize(y, output_dtype(x, out), out), last_state
