"""`mq_ao::int8_gate`: the block's gate, the online rotation and quantization to int8 in one pass, for GPUs.

x = y * z * sigmoid(s * z)      (S-SiLU, docs/method.md, S2; s absent: y * SiLU(z))
x = x @ hadamard_matrix.matrix(n)   if the input of out_proj is rotated (docs/method.md, R2)
q = quantized x, with a given scale or with one for every token.

x86 has `qgate`, on unsigned activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.gate import check_rows as check_gate
from mq_ao.ops.gate import gated
from mq_ao.ops.grids import Grid, check_grid, dequantize
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, operator
from mq_ao.ops.quantized_rows import check_rows, empty_rows, quantize_rows


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    for name, x in (("y", a.y), ("z", a.z)):
        require(x.dtype in (torch.float32, torch.int8), f"int8_gate takes {name} in float32 or int8, not in {x.dtype}.")
        if x.dtype == torch.int8:
            check_grid(f"int8_gate: {name}", x.dtype, Grid.of(a, name))
    check_gate(a)
    out = Grid.of(a, "out")
    check_rows("int8_gate", torch.int8, out)
    return empty_rows(a.y, torch.int8, out)


@operator(results=_results)
def int8_gate(
    y: Tensor,
    y_scale: float,
    y_zero_point: int,
    z: Tensor,
    z_scale: float,
    z_zero_point: int,
    s: Tensor | None,
    hadamard: bool,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gates, rotates (the reference in float64) and quantizes.

    The Triton kernel adds in another order, so that values next to a rounding boundary may come out one step apart.

    Args:
        y: (..., n), float32, or int8 that stands for `(y - y_zero_point) * y_scale`; rows may be strided.
        y_scale: positive; not looked at for float32.
        y_zero_point: within -128..127; not looked at for float32.
        z: as `y`, of the same shape.
        z_scale: as `y_scale`.
        z_zero_point: as `y_zero_point`.
        s: smoothing of the gate, float32 (n,); None stands for ones.
        hadamard: whether to rotate; then n is an order that `hadamard_matrix.factor` takes.
        out_scale: positive: all is rounded as by `quantized_decomposed.quantize_per_tensor`; None: every row is
            rounded by itself, by `linear_packed.int8_per_token`.
        out_zero_point: within -128..127; not looked at without `out_scale`.

    Returns:
        q, int8 (..., n), contiguous; and without `out_scale` the scales of the rows, float32 (..., 1), else an empty
        tensor (0,).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    left, right = dequantize(y, Grid(y_scale, y_zero_point)), dequantize(z, Grid(z_scale, z_zero_point))
    return quantize_rows(gated(left, right, s, hadamard), torch.int8, Grid(out_scale, out_zero_point))
