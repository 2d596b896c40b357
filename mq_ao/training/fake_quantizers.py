"""What stands in a graph that is trained where integers will be: rounding, with the gradient of the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.observer import MappingType

from mq_ao.errors import MqAoError
from mq_ao.ops.linear_packed import int8_per_token
from mq_ao.quantizer.observers import PER_TOKEN_EPS, PlannedState, PlannedWeight, TokenObserver
from mq_ao.quantizer.weights import LIMITS, QuantizedWeight, spread, to_grid

_SMALLEST = torch.finfo(torch.float32).tiny
"""A scale stays above zero."""


def fake_quantizer(observer: nn.Module) -> nn.Module:
    """What is trained in the place of an observer.

    Args:
        observer: of a graph that was prepared and calibrated.

    Raises:
        MqAoError: it is none of ours.
    """
    if isinstance(observer, PlannedWeight):
        return TrainedWeight(observer.weight)
    if isinstance(observer, PlannedState):
        return RoundedState(observer.scale)
    if isinstance(observer, TokenObserver):
        return RoundedTokens(observer.mapping_type is MappingType.SYMMETRIC, observer.bits, observer.group_size)
    if hasattr(observer, "calculate_qparams"):
        return RoundedValues(observer)
    raise MqAoError(f"{type(observer).__name__} is no observer of mq_ao, and cannot be trained with.")


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value` (Bengio et al., 2013)."""
    return rounded.detach() + (value - value.detach())


class TrainedWeight(nn.Module):
    """A weight on its grid, whose scales are learned with it (Esser et al., ICLR 2020, equations 1 to 3).

    Args:
        planned: integers and scales to begin with.
    """

    def __init__(self, planned: QuantizedWeight) -> None:
        super().__init__()
        self._planned = planned
        self.scale = nn.Parameter(planned.scale.clone())

    def begin(self, weight: Tensor) -> Tensor:
        """The weight (out, in), moved to where it rounds to the planned integers.

        GPTQ chooses others than the nearest: those weights begin on the grid.
        """
        nearest = to_grid(weight.double(), self._spread(self._planned.scale).double(), self._planned.bits)
        return torch.where(nearest == self._planned.values, weight, self._planned.dequantized())

    def forward(self, weight: Tensor) -> Tensor:
        """weight (out, in) float32 -> that of the nearest integers."""
        low, high = LIMITS[self._planned.bits]
        # The paper's gradient scale: that of a weight and that of its scale come to one order of magnitude.
        share = (weight.numel() / self.scale.numel() * high) ** -0.5
        scale = self._spread(straight_through(self.scale * share, self.scale).clamp(min=_SMALLEST))
        units = weight / scale
        return straight_through(units, units.round()).clamp(low, high) * scale

    def trained(self, weight: Tensor) -> QuantizedWeight:
        """Integers and scales of the weight as it is now."""
        scale = self.scale.detach().clamp(min=_SMALLEST)
        values = to_grid(weight.detach().double(), self._spread(scale).double(), self._planned.bits).to(torch.int8)
        return QuantizedWeight(values, scale.clone(), self._planned.group_size, self._planned.bits)

    def _spread(self, scale: Tensor) -> Tensor:
        return spread(scale, self._planned.values.shape[1], self._planned.group_size)


class RoundedValues(nn.Module):
    """An activation with the range that calibration found."""

    def __init__(self, observer: Any) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        self._grid = (float(scale), int(zero_point), int(observer.quant_min), int(observer.quant_max))

    def forward(self, value: Tensor) -> Tensor:
        """Values of any shape; beyond the range the gradient is zero."""
        return torch.fake_quantize_per_tensor_affine(value, *self._grid)


class RoundedTokens(nn.Module):
    """An activation with a range for each token, the last axis, around 0 or not."""

    def __init__(self, symmetric: bool, bits: int = 8, group_size: int = 0) -> None:
        super().__init__()
        self._symmetric, self._options = symmetric, (bits, group_size)

    def forward(self, value: Tensor) -> Tensor:
        """(..., channels)."""
        detached = value.detach()
        if self._symmetric:
            integers, scale = int8_per_token(detached, *self._options)
            wide = scale.repeat_interleave(value.shape[-1] // scale.shape[-1], dim=-1)
            return straight_through(value, integers * wide)
        low, high = detached.amin(-1, keepdim=True).clamp(max=0), detached.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=PER_TOKEN_EPS)
        zero = -128 - torch.round(low / scale)
        return straight_through(value, (torch.clamp(torch.round(detached / scale) + zero, -128, 127) - zero) * scale)


class RoundedState(nn.Module):
    """A carried state with known scales."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.scale: Tensor

    def forward(self, state: Tensor) -> Tensor:
        """(batch, channels, d_state)."""
        rounded = torch.ops.mq_ao.quantize_state(state.detach(), self.scale)
        return straight_through(state, torch.ops.mq_ao.dequantize_state(rounded, self.scale))
