"""Depthwise convolutions over a sequence as the causal one, which integer kernels take.

y[t] = sum_k weight[k] x[t - left + k] is the causal convolution d_conv - 1 - left steps later, of x with the zeros that
are padded behind it. Where the padding is that of `nn.Conv1d(..., padding=d_conv - 1)` and the steps behind the
sequence are cut off afterwards, `graph.canonical` drops both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def padding(x: Tensor, weight: Tensor, groups: int, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Zeros before and behind the sequence of a depthwise `torch.nn.functional.conv1d`; None for any other.

    Args:
        x: (batch, channels, length).
        weight: (channels, 1, d_conv).
        groups: as in `conv1d`.
        options: stride, padding and dilation where they are not the defaults.
    """
    if x.dim() != 3 or groups != weight.shape[0] or weight.shape[1] != 1 or options.keys() - {"padding"}:
        return None
    given, d_conv = options.get("padding", 0), weight.shape[2]
    if given == "same":
        left = (d_conv - 1) // 2
        return left, d_conv - 1 - left
    if given == "valid":
        given = 0
    size = given if isinstance(given, int) else given[0]
    # With as many zeros as taps, the first output would be of zeros alone: nobody writes that.
    return (size, size) if size < d_conv else None


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, zeros: tuple[int, int]) -> Tensor:
    """The convolution, channel-last.

    Args:
        x: (batch, length, channels).
        weight: (channels, 1, d_conv).
        bias: (channels,) or None.
        zeros: see `padding`.

    Returns:
        (batch, length + zeros - d_conv + 1, channels).
    """
    before, behind = zeros
    x = pad(x, (0, 0, 0, behind)) if behind else x
    y, _ = torch.ops.mq_ao.causal_conv1d(x, weight.squeeze(1), bias)
    late = weight.shape[2] - 1 - before
    return torch.ops.aten.slice.Tensor(y, 1, late) if late else y
