"""Drawn operands of `mq_ao::int8_conv_step_` and `int8_scan_step_`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mq_ao.ops import nibbles
from mq_ao.ops.linear_rows import linear_rows


def integers(gen: torch.Generator, *shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=gen)


@dataclass(frozen=True)
class ConvCase:
    """A drawn call of `int8_conv_step_`; `options`: token scales, correction, bias, bias of the convolution.

    Scales of groups are in bfloat16 if they are `narrow`.
    """

    batch: int = 3
    inputs: int = 48
    group: int = 0
    int4: bool = False
    narrow: bool = False
    sizes: tuple[int, ...] = (40, 37)
    piece: int = 0
    taps: int = 4
    options: tuple[bool, bool, bool, bool] = (True,) * 4
    activation: str | None = "silu"
    rounded: bool = True
    seed: int = 0

    def _state(self, gen: torch.Generator, size: int) -> Tensor:
        """In steps of its grid, and more than that has; not next to halves, where kernels may round in two ways."""
        shape = (self.batch, self.taps - 1, size)
        whole = torch.randint(-160, 161, shape, generator=gen)
        return whole + (torch.rand(shape, generator=gen) - 0.5) * 0.9

    def arguments(self) -> dict[str, Any]:
        """By name; the piece that the convolution reads fills its grid and more."""
        gen = torch.Generator().manual_seed(self.seed)
        per_token, corrected, biased, shifted = self.options
        n, k, size = sum(self.sizes), self.group * 2 or self.inputs, self.sizes[self.piece]
        weight = integers(gen, n, k, low=-8, high=7) if self.int4 else integers(gen, n, k)
        shape = (n, k // self.group) if self.group else (n,)
        weight_scale = torch.rand(shape, generator=gen) * 1e-3 + 1e-4
        linear = {
            "q": integers(gen, self.batch, 1, 2 * k)[..., ::2],
            "token_scale": torch.rand(self.batch, 1, 1, generator=gen) + 0.5 if per_token else None,
            "weight": nibbles.pack(weight, self.group) if self.int4 else weight,
            "scale": weight_scale.to(torch.bfloat16) if self.narrow else weight_scale,
            "correction": weight.view(*shape, -1).sum(-1, dtype=torch.int32) * 5 if corrected else None,
            "bias": torch.randn(n, generator=gen) if biased else None,
        }
        scale = float(linear_rows.reference(**linear, group_size=self.group).abs().max()) / 140
        scales = [scale if place == self.piece else (0.0, 0.06)[place % 2] for place in range(len(self.sizes))]
        return {
            **linear,
            "sizes": list(self.sizes),
            "out_scales": scales,
            "out_zero_points": [-11, 3, 0][: len(self.sizes)],
            "group_size": self.group,
            "piece": self.piece,
            "conv_weight": integers(gen, size, self.taps, low=-127),
            "conv_weight_scale": torch.rand(size, generator=gen) * 0.01 + 1e-3,
            "conv_bias": torch.randn(size, generator=gen) if shifted else None,
            "conv_state": self._state(gen, size) * scale,
            "activation": self.activation,
            "conv_out_scale": 0.05 if self.rounded else None,
            "conv_out_zero_point": 3,
        }


@dataclass(frozen=True)
class ScanCase:
    """A drawn call of `int8_scan_step_`; `options`: correction, bias, D, delta_bias and softplus."""

    batch: int = 3
    rank: int = 48
    channels: int = 20
    groups: int | None = None
    d_state: int = 16
    dtype: torch.dtype = torch.int8
    options: tuple[bool, bool, bool, bool, bool] = (True,) * 5
    int8_state: bool = True
    rounded: bool = True
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """By name; u, B and C are of `dtype`, parts of wider rows."""
        gen = torch.Generator().manual_seed(self.seed)
        corrected, biased, skip, shifted, softplus = self.options
        channels, matrix = self.channels * (self.groups or 1), (self.d_state,)
        matrix = matrix if self.groups is None else (self.groups, self.d_state)
        low = 0 if self.dtype == torch.uint8 else -128

        def operand(name: str, *width: int) -> dict[str, Any]:
            x = torch.randn(self.batch, 1, *width[:-1], width[-1] + 3, generator=gen)[..., 1:-2]
            if self.dtype != torch.float32:
                x = ((x / 0.03).round() + (low + 130)).clamp(low, low + 255).to(self.dtype)
            return {name: x, f"{name}_scale": 0.03, f"{name}_zero_point": low + 130}

        # Without the softplus step sizes are outputs of the linear, and have to be positive.
        weight = integers(gen, channels, self.rank, low=-128 if softplus else 0)
        q = integers(gen, self.batch, 1, self.rank, low=-128 if softplus else 5)
        scale = torch.rand(channels, generator=gen) + 0.1
        correction = weight.sum(1, dtype=torch.int32) * 5 if corrected else None
        scale /= float(linear_rows.reference(q, None, weight, scale, correction).abs().max()) + 1
        bias = torch.rand(channels, generator=gen) if biased else None
        A = -torch.rand(channels, self.d_state, generator=gen) * 8
        state = torch.randn(self.batch, *A.shape, generator=gen)
        return {
            "q": q,
            "weight": weight,
            "scale": scale,
            "correction": correction,
            "bias": bias,
            "delta_scale": 0.013,
            "delta_zero_point": -20,
            **operand("u", channels),
            "A": A,
            **operand("B", *matrix),
            **operand("C", *matrix),
            "D": torch.randn(channels, generator=gen) if skip else None,
            "delta_bias": torch.randn(channels, generator=gen).abs() * 0.5 if shifted else None,
            "delta_softplus": softplus,
            "state": (state * 40).clamp(-127, 127).to(torch.int8) if self.int8_state else state,
            "state_scale": torch.rand(A.shape, generator=gen) * 0.01 + 0.01 if self.int8_state else None,
            "out_scale": 0.05 if self.rounded else None,
            "out_zero_point": -11 if self.dtype == torch.int8 else 117,
        }
