"""Rounding for the loss: GPTQ along inputs and outputs, with scales that are fitted to the integers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.quantizer.feedback import compensation, damped, round_both
from mq_ao.quantizer.weights import QuantizedWeight, round_to_grid, spread

_STEPS = 8
"""Of conjugate gradients; the scales are few, and start near the best."""


def fisher(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    tokens: float = math.inf,
    input_damping: float = 0.05,
    output_damping: float = 0.1,
    rounds: int = 2,
) -> QuantizedWeight:
    """Quantizes a linear layer's weight so that the model's predictions change least.

    To second order KL(float || quantized) is half the square of the change E of the weight under the Fisher
    information, which is taken to be the Kronecker product of two moments (Martens and Grosse, 2015; Tseng et al.,
    YAQA, 2025). That makes it tr(outputs E inputs E^T). Inputs and outputs of largest moment are rounded first; then
    the scales are fitted to the integers, and everything is rounded again with these. What is returned is the best that
    was met, rounding to nearest included.

    Args:
        weight: (out, in) of any floating-point dtype.
        inputs: (in, in), second moment of the layer's input, every token weighted by its gradient's square.
        outputs: (out, out), second moment of the gradient of log p by the layer's output.
        bits: 8, 4 or 3.
        group_size: consecutive inputs that share a scale; None: one scale a row.
        tokens: of which the moments are means. The fewer, the more is added to the diagonals: twice the mean diagonal
            where there is one token an input, four times that of `outputs` where there is one an output, and less by
            the square of their number.
        input_damping: share of the mean diagonal that is added to the diagonal of `inputs`.
        output_damping: likewise of `outputs`, which is an estimate from noisier numbers.
        rounds: how often the weight is rounded.

    Returns:
        The integers and their scales.

    Raises:
        MqAoError: the shapes do not fit, a number is not finite, or a damped moment is not positive definite.
    """
    _check(weight, inputs, outputs)
    best = round_to_grid(weight, bits, group_size, True, inputs.diagonal())
    moments = (
        damped(inputs.double(), input_damping + 2 * (len(inputs) / tokens) ** 2),
        damped(outputs.double(), output_damping + 4 * (len(outputs) / tokens) ** 2),
    )
    columns, rows = (torch.argsort(moment.diagonal(), descending=True, stable=True) for moment in moments)
    along = compensation(moments[0][columns][:, columns])
    across = compensation(moments[1][rows][:, rows])
    exact, scale = weight.double(), best.scale
    # In float32 for the scales, whose fit is most of the work: of mean 1, so that no product leaves the range.
    single = tuple((moment / moment.diagonal().mean()).float() for moment in moments)
    least = loss_change(weight, best, *moments)
    for _ in range(rounds):
        wide = spread(scale, weight.shape[1], group_size).double().expand(weight.shape)
        values = torch.empty_like(exact)
        values[rows[:, None], columns] = round_both(
            exact[rows][:, columns], wide[rows][:, columns], along, across, bits
        )
        scale = fitted_scale(exact.float(), values.float(), scale, single[0], single[1], group_size)
        found = QuantizedWeight(values.to(torch.int8), scale, group_size, bits)
        change = loss_change(weight, found, *moments)
        if change < least:
            best, least = found, change
    return best


def loss_change(weight: Tensor, quantized: QuantizedWeight, inputs: Tensor, outputs: Tensor) -> Tensor:
    """tr(outputs E inputs E^T) of what quantization adds to a weight, float64."""
    change = weight.double() - quantized.dequantized().double()
    return ((outputs @ change @ inputs) * change).sum()


def fitted_scale(
    weight: Tensor, values: Tensor, scale: Tensor, inputs: Tensor, outputs: Tensor, group_size: int | None
) -> Tensor:
    """The scales of least `loss_change` for these integers, by conjugate gradients; where one would not be positive, as
    it was.

    Args:
        weight: (out, in), float32 or float64, in which all is computed.
        values: (out, in), integers.
        scale: see `QuantizedWeight`; where the search starts.
        inputs: (in, in).
        outputs: (out, out).
        group_size: see `QuantizedWeight`.
    """
    size = weight.shape[1] if group_size is None else group_size

    def sums(matrix: Tensor) -> Tensor:
        """Over the inputs of each group, (out, groups)."""
        return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size)).unflatten(1, (-1, size)).sum(2)

    def product(change: Tensor) -> Tensor:
        """What the loss says of a change of the weight, scale by scale."""
        return sums((outputs @ change @ inputs) * values)

    def of(scales: Tensor) -> Tensor:
        return values * spread(scales, weight.shape[1], size)

    found = scale.to(weight.dtype).reshape(len(weight), -1)
    diagonal = sums(values.square() * outputs.diagonal()[:, None] * inputs.diagonal())
    diagonal = diagonal.clamp(min=torch.finfo(weight.dtype).tiny)  # a group of zeros has no say
    residual = product(weight - of(found))
    direction = residual / diagonal
    power = (residual * direction).sum()
    for _ in range(_STEPS):
        if power <= 0:
            break
        curved = product(of(direction))
        step = power / (direction * curved).sum()
        found = found + step * direction
        residual = residual - step * curved
        scaled = residual / diagonal
        before, power = power, (residual * scaled).sum()
        direction = scaled + power / before * direction
    fitted = found.reshape(scale.shape).to(scale.dtype)
    return torch.where((fitted > torch.finfo(scale.dtype).tiny) & fitted.isfinite(), fitted, scale)


def _check(weight: Tensor, inputs: Tensor, outputs: Tensor) -> None:
    if weight.dim() != 2 or inputs.shape != weight.shape[1:] * 2 or outputs.shape != weight.shape[:1] * 2:
        raise MqAoError(
            f"the weight is {tuple(weight.shape)}, the moments {tuple(inputs.shape)} and {tuple(outputs.shape)}: give "
            "(out, in), (in, in) and (out, out)."
        )
    if not (torch.isfinite(inputs).all() and torch.isfinite(outputs).all()):
        raise MqAoError("a second moment holds NaN or Inf: calibrate on other data.")
