"""`mq_ao::linear_rows_weight_only`: a linear layer of float activations with row-major weights, as GPUs read them.

x86 has `linear_packed_weight_only`, on packed weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.linear_rows import check_weight, integers
from mq_ao.ops.operator import Operands, like, operator


def dequantized(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """The weight in float32, (N, K)."""
    values, scale = integers(weight, group_size), scale.to(torch.float32)
    return values * (scale.repeat_interleave(group_size, 1) if group_size else scale[:, None])


def _results(a: Operands) -> Tensor:
    require(
        a.x.dtype in (torch.float32, torch.bfloat16) and a.x.dim() >= 1,
        f"linear_rows_weight_only takes float32 or bfloat16 activations (..., K), not {a.x.dtype} {tuple(a.x.shape)}.",
    )
    check_weight(a.x, a)
    return like(a.x, (*a.x.shape[:-1], a.weight.shape[0]), torch.float32)


@operator(results=_results)
def linear_rows_weight_only(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, group_size: int = 0
) -> Tensor:
    """`y = x @ (weight * scale).T + bias`.

    Args:
        x: float32 or bfloat16 (..., K), K up to 65536.
        weight: int8 (N, K), or uint8 (N, K / 2) from `nibbles.pack`; contiguous.
        scale: float32 (N,); with groups float32 or bfloat16 (N, K / group_size).
        bias: float32 (N,), or None.
        group_size: inputs that share a scale; it divides K. 0: all of them.

    Returns:
        float32 (..., N).

    Raises:
        MqAoError: a dtype or a shape is not as above.
    """
    return torch.nn.functional.linear(x.to(torch.float32), dequantized(weight, scale, group_size), bias)
