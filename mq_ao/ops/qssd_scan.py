"""`mq_ao::qssd_scan`: the recurrence of `mq_ao::ssd_scan` on 8-bit operands (docs/method.md, section 5).

Operands and outputs are read and written as integers; softplus, decays, recurrence and states are float32. Step sizes
are quantized before the softplus, never after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.grids import check_operand, check_output, dequantize, output_dtype, requantize
from mq_ao.ops.ssd_scan import _check_shapes, ssd_scan

_Grid = tuple[Tensor, float, int]  # an operand with its scale and zero point


def _check(x: _Grid, dt: _Grid, B: _Grid, C: _Grid, out_scale: float | None, out_zero_point: int) -> None:
    """Raises MqAoError on types and grids that do not fit."""
    for name, grid in (("x", x), ("dt", dt), ("B", B), ("C", C)):
        check_operand(f"qssd_scan: {name}", *grid)
    check_output("qssd_scan", x[0], out_scale, out_zero_point)


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
    """Reference: `ssd_scan` of the dequantized operands, then rounding.

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
    _check(
        (x, x_scale, x_zero_point),
        (dt, dt_scale, dt_zero_point),
        (B, B_scale, B_zero_point),
        (C, C_scale, C_zero_point),
        out_scale,
        out_zero_point,
    )
    values, step = dequantize("x", x, x_scale, x_zero_point), dequantize("dt", dt, dt_scale, dt_zero_point)
    b, c = dequantize("B", B, B_scale, B_zero_point), dequantize("C", C, C_scale, C_zero_point)
    y, last_state = ssd_scan(values, step, A, b, c, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx)
    return requantize(y, output_dtype(x, out_scale), out_scale, out_zero_point), last_state


def _fake(
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
    _check(
        (x, x_scale, x_zero_point),
        (dt, dt_scale, dt_zero_point),
        (B, B_scale, B_zero_point),
        (C, C_scale, C_zero_point),
        out_scale,
        out_zero_point,
    )
    _check_shapes(x, dt, A, B, C, D, dt_bias, dt_min, dt_max, initial_state, seq_idx)
    batch, _, heads, headdim = x.shape
    y = x.new_empty(x.shape, dtype=output_dtype(x, out_scale))
    return y, x.new_empty((batch, heads, headdim, B.shape[3]), dtype=torch.float32)


library.define(
    "qssd_scan",
    "(Tensor x, float x_scale, int x_zero_point, Tensor dt, float dt_scale, int dt_zero_point, Tensor A, "
    "Tensor B, float B_scale, int B_zero_point, Tensor C, float C_scale, int C_zero_point, Tensor? D=None, "
    "Tensor? dt_bias=None, bool dt_softplus=False, float dt_min=0.0, float? dt_max=None, Tensor? initial_state=None, "
    "Tensor? seq_idx=None, float? out_scale=None, int out_zero_point=0) -> (Tensor y, Tensor last_state)",
    fake=_fake,
    reference=qssd_scan,
)
