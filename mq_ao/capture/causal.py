"""Causal convolutions as most code writes them: `nn.Conv1d` that pads both ends, cut at the sequence's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclass(frozen=True)
class Padded:
    """A depthwise convolution of x (batch, channels, length) by weight (channels, 1, d_conv), d_conv - 1 too long."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, options: Mapping[str, Any]) -> Padded | None:
        """The convolution of these arguments of `torch.conv1d`, if it is one."""
        channels, per_group, taps = weight.shape
        padding = (taps - 1, (taps - 1,))
        simple = options.get("stride", 1) in _ONE and options.get("dilation", 1) in _ONE
        depthwise = options.get("groups", 1) == channels and per_group == 1 and x.dim() == 3
        return cls(x, weight, bias) if simple and depthwise and options.get("padding", 0) in padding else None

    def is_cut(self, dim: int, start: Any, stop: Any, step: Any) -> bool:
        """Whether a slice takes the first `length` steps, as `[..., :length]` does."""
        if dim not in (2, -1) or start not in (None, 0) or step != 1 or stop is None:
            return False
        if isinstance(stop, int) and stop < 0:
            return bool(stop == 1 - self.weight.shape[-1])
        return statically_known_true(stop == self.x.shape[-1])


@dataclass(frozen=True)
class Causal:
    """What is left after the cut, of x (batch, length, channels)."""

    x: Tensor
    padded: Padded

    def __call__(self, activation: str | None) -> Tensor:
        """Our operator's y, (batch, length, channels)."""
        weight = self.padded.weight.squeeze(1)
        y, _ = torch.ops.mq_ao.causal_conv1d(self.x, weight, self.padded.bias, None, activation)
        return y


_ONE: Sequence[Any] = (1, (1,))
