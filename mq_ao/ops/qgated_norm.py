"""`mq_ao::qgated_norm`: the gated RMSNorm of Mamba-2, the online rotation and quantization to uint8 in one pass.

x = rms_norm(y * SiLU(z)) * weight      Mamba-2's norm before out_proj, of one group, gated before it normalizes
x = x @ hadamard_matrix.matrix(n)       if the input of out_proj is rotated (docs/method.md, R2)
q = quantized x, with a given scale or with one for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.gate import check_pair, gated
from mq_ao.ops.grids import Grid
from mq_ao.ops.hadamard import check_order, rotate
from mq_ao.ops.library import require
from mq_ao.ops.norm_rows import check_weight
from mq_ao.ops.operator import Operands, operator
from mq_ao.ops.quantized_rows import check_rows, empty_rows, quantize_rows


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    y, z, out = a.y, a.z, Grid.of(a, "out")
    takes = "qgated_norm takes float32"
    require(y.dtype == z.dtype == torch.float32, f"{takes} y and z of one shape (..., n), not {y.dtype} and {z.dtype}.")
    check_pair(takes, y, z)
    check_weight(a.weight, y.shape[-1])
    if a.hadamard:
        check_order(y)
    check_rows("qgated_norm", torch.uint8, out)
    return empty_rows(y, torch.uint8, out, a.bits, a.group_size)


@operator(results=_results)
def qgated_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor | None,
    eps: float,
    hadamard: bool,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    bits: int = 8,
    group_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gates, normalizes by `torch.nn.functional.rms_norm`, rotates and quantizes.

    The native kernel rounds elsewhere on the way than the reference does, so that values next to a rounding boundary
    may come out one step apart.

    Args:
        y: (..., n), float32; rows may be strided.
        z: as `y`, of the same shape.
        weight: float32 (n,), or None for ones.
        eps: added to the mean of squares.
        hadamard: whether to rotate; then n is an order that `hadamard_matrix.factor` takes.
        out_scale: positive: all is rounded as by `quantized_decomposed.quantize_per_tensor`; None: every row is
            rounded by itself, as by `quantize_per_token`.
        out_zero_point: within 0..255; not looked at without `out_scale`.
        bits: of rows rounded by themselves, 8 or 4.
        group_size: of rows rounded by themselves, see `quantize_per_token`.

    Returns:
        q, uint8 (..., n), contiguous; without `out_scale` the scales of the rows, float32 (..., 1) or
        (..., n / group_size), else an empty
        tensor (0,).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    x = torch.nn.functional.rms_norm(gated(y, z, None, False), (y.shape[-1],), weight, eps)
    out = Grid(out_scale, out_zero_point)
    q, scale = quantize_rows(rotate(x) if hadamard else x, torch.uint8, out, bits, group_size)
    return q.contiguous(), scale
