"""GPTQ (Frantar et al., 2023): integers chosen input by input, each error made up for by the inputs still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.quantizer.feedback import compensation, damped, round_inputs
from mq_ao.quantizer.weights import QuantizedWeight, round_to_grid, spread

_ROWS = 4096
"""Outputs that are rounded at once: they know nothing of each other, and float64 copies of a whole head would be larger
than a small model."""


def gptq(
    weight: Tensor,
    second_moment: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    search: bool = True,
) -> QuantizedWeight:
    """Quantizes a linear layer's weight so that its output, not its weight, changes least.

    The scales are those of `round_to_grid`, chosen before the first integer, so that groups stay groups of consecutive
    inputs in whatever order the inputs are taken. Inputs that were always zero are rounded to nearest. A row that the
    greedy choice made worse than rounding is rounded, so that `output_error` is never above rounding's.

    Args:
        weight: (out, in) of any floating-point dtype.
        second_moment: (in, in), E[x x^T] of the layer's input, up to a factor.
        bits: 8, 4 or 3.
        group_size: consecutive inputs that share a scale; None: one scale a row.
        damping: share of the mean diagonal that is added to the diagonal; makes up for too few tokens.
        act_order: take the inputs of largest second moment first, instead of in order.
        search: choose scales of least squared error, inputs weighted by their second moments.

    Returns:
        The integers and their scales, see `round_to_grid`.

    Raises:
        MqAoError: the shapes do not fit, a number is not finite, or the damped second moment is not positive definite.
    """
    _check(weight, second_moment)
    moment = second_moment.double()
    diagonal = moment.diagonal()
    rounded = round_to_grid(weight, bits, group_size, search, diagonal if search else None)
    inputs = torch.arange(len(moment), device=moment.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else inputs
    factor = compensation(damped(moment, damping)[order][:, order])
    parts = (tensor.split(_ROWS) for tensor in (weight, rounded.values, rounded.scale))
    for rows, values, scale in zip(*parts, strict=True):
        wide = spread(scale, weight.shape[1], group_size)
        exact = wide.double().expand(rows.shape)
        chosen = torch.empty_like(values)
        chosen[:, order] = round_inputs(rows.double()[:, order], exact[:, order], factor, bits).to(torch.int8)
        better = _error(rows, chosen * wide, moment) < _error(rows, values * wide, moment)
        values.copy_(torch.where(better[:, None], chosen, values))
    return rounded


def output_error(weight: Tensor, quantized: QuantizedWeight, second_moment: Tensor) -> Tensor:
    """Mean square of what quantization adds to every output, (out,) float64: diag((W-Q) H (W-Q)^T)."""
    return _error(weight, quantized.dequantized(), second_moment.double())


def _error(weight: Tensor, stands_for: Tensor, moment: Tensor) -> Tensor:
    change = weight.double() - stands_for.double()
    return ((change @ moment) * change).sum(1)


def _check(weight: Tensor, second_moment: Tensor) -> None:
    if weight.dim() != 2 or second_moment.shape != (weight.shape[1], weight.shape[1]):
        raise MqAoError(
            f"the weight is {tuple(weight.shape)} and the second moment {tuple(second_moment.shape)}: give (out, in) "
            "and (in, in)."
        )
    if not torch.isfinite(second_moment).all():
        raise MqAoError("the second moment holds NaN or Inf: calibrate on other data.")
