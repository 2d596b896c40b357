"""`mq_ao::round_tile`: weights rounded to integers, each error made up for by those after it in both axes.

Greedy rounding with feedback (Frantar et al., GPTQ, 2023; Tseng et al., YAQA, 2025) of one tile of a weight. What the
errors of a tile do to other tiles is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    require(
        a.weight.dim() == 2 and a.weight.dtype == torch.float64,
        f"round_tile takes a float64 matrix, not {a.weight.dtype} {tuple(a.weight.shape)}.",
    )
    height, width = a.weight.shape
    fitting = {"scale": (height, width), "owed": (height, width), "inputs": (width, width), "outputs": (height, height)}
    for name, shape in fitting.items():
        given = getattr(a, name)
        require(
            given.dtype == torch.float64 and given.shape == shape,
            f"round_tile: {name} must be float64 {shape}, it is {given.dtype} {tuple(given.shape)}.",
        )
    require(a.low <= a.high, f"round_tile: the integers go from {a.low} to {a.high}.")
    return like(a.weight, (height, width)), like(a.weight, (height, width))


@operator(results=_results)
def round_tile(
    weight: Tensor, scale: Tensor, owed: Tensor, inputs: Tensor, outputs: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Rounds output by output, and each of them input by input.

    A weight makes up for errors of earlier inputs of its own output, times `inputs`, and for what earlier outputs are
    off by at its own input, times `outputs`: that is their error and what they made up for themselves. Integers are the
    nearest, ties to even. What is below the diagonals of `inputs` and `outputs`, and on them, is not read.

    Args:
        weight: (out, in) float64, finite.
        scale: (out, in) float64 above 0, of every weight.
        owed: (out, in) float64, what each weight makes up for already.
        inputs: (in, in) float64, strictly upper triangular: what an error of input i asks of input j > i.
        outputs: (out, out) float64, likewise of outputs.
        low: smallest integer.
        high: largest integer.

    Returns:
        The integers and the errors that are left, each (out, in) float64, contiguous.

    Raises:
        MqAoError: a dtype or a shape is not as above.
    """
    # A weight can be rounded once those before it in both axes are. With the last output first, all that can be are a
    # diagonal.
    left, size, owing = (tensor.flip(0) for tensor in (weight, scale, owed))
    along, across = inputs.triu(1), outputs.triu(1).flip(0, 1).t().contiguous()
    values, errors = torch.empty_like(left), torch.empty_like(left)
    height, width = weight.shape
    for offset in range(1 - height, width):
        first, last = max(0, -offset), min(height, width - offset)
        row, column = slice(first, last), slice(first + offset, last + offset)
        wanted = left.diagonal(offset) - owing.diagonal(offset)
        chosen = torch.round(wanted / size.diagonal(offset)).clamp_(low, high)
        error = wanted - chosen * size.diagonal(offset)
        values.diagonal(offset).copy_(chosen)
        errors.diagonal(offset).copy_(error)
        left[:last, column].addcmul_(across[:last, row], (owing.diagonal(offset) + error)[None], value=-1)
        owing[row].addcmul_(along[column], error[:, None])
    return values.flip(0), errors.flip(0)
