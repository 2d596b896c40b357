"""What `torch.compile` makes of `mq_ao::int8_linear` on a GPU: `aten._int_mm`, with all around it in its epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import fast_random_decomps, register_decomposition

from mq_ao.ops.int8_linear import finished, scaled

# What the CUDA kernel behind `aten._int_mm` asks for.
_MORE_ROWS_THAN = 16
_MULTIPLE = 8


def product(
    q: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None = None,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    group_size: int = 0,
) -> Tensor:
    """`int8_linear` without groups in plain operators; see there."""
    rows = q.reshape(-1, q.shape[-1])
    scales = None if token_scale is None else token_scale.reshape(-1, 1)
    y = scaled(torch.ops.aten._int_mm(rows, weight.t()), scales, scale, correction)
    return finished(y, bias, out_scale, out_zero_point).reshape(*q.shape[:-1], weight.shape[0])


@register_decomposition([torch.ops.mq_ao.int8_linear.default])
def _inlined(q: Tensor, token_scale: Tensor | None, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Few rows, int4 and odd sizes stay whole: those are our own kernel's."""
    group_size = kwargs.get("group_size", args[5] if len(args) > 5 else 0)
    sizes = (q.shape[-1] | weight.shape[0]) % _MULTIPLE == 0
    if q.device.type != "cuda" or group_size or weight.dtype != torch.int8 or not sizes:
        return NotImplemented
    if q.numel() // q.shape[-1] <= _MORE_ROWS_THAN:
        return NotImplemented
    return product(q, token_scale, weight, *args, **kwargs)


# Inductor copies its table when it first compiles, which may have been before this file was imported.
fast_random_decomps.cache_clear()
