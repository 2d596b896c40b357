"""Weights on symmetric integer grids: one scale a row, or one a group of inputs, with or without a clipping search."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mq_ao.errors import MqAoError

LIMITS = {3: (-4, 3), 4: (-8, 7), 8: (-127, 127)}
"""Smallest and largest integer by bits."""
# What the largest magnitude is divided by. In int4 that is 8 although 8 itself is cut to 7: on trained weights the
# finer grid outweighs the one weight that may lose a step. Likewise in int3.
_REACH = {3: 4.0, 4: 8.0, 8: 127.0}
# Candidates of the search, as shares of the scale without it: from what cuts nothing in int4 (8/7) to half.
_SHARES = tuple(1.145 - 0.025 * step for step in range(26))
# Rows that are quantized at once hold about this many weights, so that temporaries stay small next to the model.
_CHUNK = 2**18


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix as integers times scales.

    Attributes:
        values: (out, in) int8, within `LIMITS`.
        scale: float32 above 0; (out,) per channel, or (out, groups) per group.
        group_size: consecutive inputs that share a scale (the last group may be shorter); None: all of a row.
        bits: 8, 4 or 3.
    """

    values: Tensor
    scale: Tensor
    group_size: int | None = None
    bits: int = 8

    def with_group_scale(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same integers, with the scales of groups (not those of channels) rounded to what a backend keeps."""
        if self.group_size is None or dtype == torch.float32:
            return self
        return replace(self, scale=self.scale.to(dtype).float())

    def dequantized(self) -> Tensor:
        """The weight that the integers stand for, (out, in) float32."""
        return self.values * spread(self.scale, self.values.shape[1], self.group_size)


def spread(scale: Tensor, inputs: int, group_size: int | None) -> Tensor:
    """The scale of every weight, (out, inputs), or (out, 1) where a row has only one; see `QuantizedWeight`."""
    if group_size is None:
        return scale[:, None]
    return scale.repeat_interleave(group_size, dim=1)[:, :inputs]


def to_grid(weight: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """The nearest integers of the grid, ties to even, in the dtype of `weight`; the shapes broadcast."""
    low, high = LIMITS[bits]
    return torch.round(weight / scale).clamp_(low, high)


def round_to_grid(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    search: bool = False,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Quantizes every weight to the nearest integer of a symmetric grid (docs/method.md, section 5).

    Args:
        weight: (out, in) of any floating-point dtype.
        bits: 8, 4 or 3.
        group_size: consecutive inputs that share a scale; None: one scale a row.
        search: choose the scale of least squared error from a fixed set, instead of the one that the largest weight
            asks for.
        importance: (in,), not negative, the weight of every input in that error, usually E[x_k^2]; None: all alike.

    Returns:
        The integers and their scales; rows and groups of zeros have scale 1.

    Raises:
        MqAoError: the weight is not a finite matrix, or bits, group_size or importance do not fit it.
    """
    _check(weight, bits, group_size, importance)
    inputs = weight.shape[1]
    parts = weight.split(max(1, _CHUNK // inputs))
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    for part, rounded in zip(parts, values.split(len(parts[0])), strict=True):
        scale = _scale(part, bits, group_size, search, importance)
        # In float64, so that no quotient is rounded onto a tie.
        rounded.copy_(to_grid(part.double(), spread(scale.double(), inputs, group_size), bits))
        scales.append(scale)
    return QuantizedWeight(values, torch.cat(scales), group_size, bits)


def _scale(weight: Tensor, bits: int, group_size: int | None, search: bool, importance: Tensor | None) -> Tensor:
    """The scales of `QuantizedWeight`."""
    grouped = _grouped(weight.float(), group_size)
    largest = grouped.abs().amax(-1)
    # Below the smallest normal number there is no scale: such weights become zeros.
    scale = torch.where(largest > 0, (largest / _REACH[bits]).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    if search:
        scale = scale * _best_share(grouped / scale[..., None], bits, _cost(weight, group_size, importance))
    return scale[:, 0] if group_size is None else scale


def _best_share(units: Tensor, bits: int, cost: Tensor) -> Tensor:
    """The share of the scale, (out, groups), that makes the squared error least.

    Args:
        units: (out, groups, group size), weights over their scale, so that no square overflows or vanishes.
        bits: 8, 4 or 3.
        cost: (1, groups, group size), what a squared error costs.
    """
    best = torch.ones_like(units[..., 0])
    least = torch.full_like(best, torch.inf)
    for share in (1.0, *_SHARES):
        error = to_grid(units, share, bits).mul_(share).sub_(units).square_().mul_(cost).sum(-1)
        better = error < least
        best, least = best.masked_fill(better, share), torch.where(better, error, least)
    return best


def _cost(weight: Tensor, group_size: int | None, importance: Tensor | None) -> Tensor:
    """(1, groups, group size) float32, at most 1."""
    cost = weight.new_ones(weight.shape[1]) if importance is None else importance / importance.max().clamp(min=1e-30)
    return _grouped(cost.to(weight.device, torch.float32)[None], group_size)


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """(out, groups, group size), the last group filled up with zeros, which fit every grid without error."""
    rows, inputs = weight.shape
    size = inputs if group_size is None else group_size
    return torch.nn.functional.pad(weight, (0, -inputs % size)).reshape(rows, -1, size)


def _check(weight: Tensor, bits: int, group_size: int | None, importance: Tensor | None) -> None:
    if bits not in LIMITS:
        raise MqAoError(f"weights of {bits} bits are not supported: choose 8, 4 or 3.")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise MqAoError(
            f"a weight is {tuple(weight.shape)} {weight.dtype}: give a matrix (out, in) of floating-point numbers."
        )
    # Without a temporary of the weight's size.
    if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise MqAoError("a weight holds NaN or Inf: the checkpoint is broken, load another one.")
    if group_size is not None and group_size < 1:
        raise MqAoError(f"the group size is {group_size}: give at least 1, or None for one scale a row.")
    if importance is None:
        return
    if importance.shape != weight.shape[1:]:
        raise MqAoError(
            f"importance is {tuple(importance.shape)} and the weight {tuple(weight.shape)}: give one number an input."
        )
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise MqAoError("importance holds negative numbers, NaN or Inf: give the mean square of every input.")
