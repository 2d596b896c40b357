"""`mq_ao::linear_packed_weight_only`: linear layer of float activations with 8-bit or 4-bit weights.

The weights are those of `linear_packed`, packed in the same way (see `packing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator
from mq_ao.ops.packing import check_linear, linear_unpack


def _results(a: Operands) -> Tensor:
    require(
        a.x.dtype in (torch.float32, torch.bfloat16),
        f"linear_packed_weight_only takes float32 or bfloat16 activations, not {a.x.dtype}.",
    )
    n = check_linear(a.x, a)
    return like(a.x, (*a.x.shape[:-1], n), torch.float32)


@operator(results=_results)
def linear_packed_weight_only(
    x: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, bits: int = 8, group_size: int = 0
) -> Tensor:
    """Linear layer with quantized weights only: `y = x @ (weight * weight_scale).T + bias`.

    The native kernel rounds each row of `x` to 24-bit integers in units of `max|row| / 8388600` (at least the
    smallest normal float32) and sums their products with the weights exactly. It errs less than a float32 product
    on rows without outliers, and some three times as much where a channel is 100 times as large as the others.

    Args:
        x: float32 or bfloat16 (..., K); rows may be strided.
        packed: weights from `packing.linear_prepack` with the same `bits` and `group_size`.
        weight_scale: float32 (N,), or (N, ceil(K / group_size)) with groups, best stored as `linear_packed` says.
        bias: float32 (N,), or None.
        bits: 8 or 4, of the packed weights.
        group_size: inputs that share a scale, a multiple of 4; 0: all.

    Returns:
        float32 (..., N); NaN in every row where x has a NaN or an infinity.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    n, k = weight_scale.shape[0], x.shape[-1]
    weight = linear_unpack.reference(packed, n, k, bits, group_size)
    scale = weight_scale.repeat_interleave(group_size, 1)[:, :k] if group_size else weight_scale[:, None]
    y = torch.nn.functional.linear(x.to(torch.float32), weight * scale, bias)
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan)
