"""`mq_ao::weight_linear`: a linear layer of float activations with int8 or int4 row-major weights, as GPUs read them.

x86 has `wlinear`, on packed weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops import library
from mq_ao.ops.int8_linear import check_weight, integers
from mq_ao.ops.library import require


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group_size: int) -> None:
    require(
        x.dtype in (torch.float32, torch.bfloat16) and x.dim() >= 1,
        f"weight_linear takes float32 or bfloat16 activations (..., K), not {x.dtype} {tuple(x.shape)}.",
    )
    check_weight(x.shape[-1], weight, scale, bias, group_size)


def dequantized(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """The weight in float32, (N, K)."""
    values, scale = integers(weight, group_size), scale.to(torch.float32)
    return values * (scale.repeat_interleave(group_size, 1) if group_size else scale[:, None])


def weight_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, group_size: int = 0) -> Tensor:
    """Reference: `y = x @ (weight * scale).T + bias`.

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
    _check(x, weight, scale, bias, group_size)
    return torch.nn.functional.linear(x.to(torch.float32), dequantized(weight, scale, group_size), bias)


def fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, group_size: int = 0) -> Tensor:
    """Checks the operands of `weight_linear`, and gives an empty result."""
    _check(x, weight, scale, bias, group_size)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


library.define(
    "weight_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, int group_size=0) -> Tensor",
    fake=fake,
    reference=weight_linear,
)
