"""Greedy rounding with feedback: each error is made up for by the weights that are still to be rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops.round_tile import round_tile
from mq_ao.quantizer.weights import LIMITS, to_grid

_BLOCK = 128


def damped(moment: Tensor, damping: float) -> Tensor:
    """A second moment with a share of its mean diagonal added to its diagonal; of nothing but zeros, the identity.

    Raises:
        MqAoError: the damping is negative or not finite.
    """
    if not 0 <= damping < float("inf"):
        raise MqAoError(f"the damping is {damping}: give 0 or more, 0.01 is usual.")
    mean = moment.diagonal().mean()
    result = moment.clone()
    result.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return result


def compensation(moment: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of a damped moment (Frantar et al., 2023, step 3).

    It is inverted as a factor: moment = R R^T with R upper triangular, which is a Cholesky factorization from the last
    row to the first, and U = R^-1.

    Raises:
        MqAoError: the moment is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.flip(0, 1))
    if failed:
        raise MqAoError("a second moment is not positive definite: raise the damping.")
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1)


def round_inputs(weight: Tensor, scale: Tensor, inputs: Tensor, bits: int) -> Tensor:
    """Input by input, each error made up for by later inputs of the same output (Frantar et al., 2023, algorithm 1).

    Args:
        weight: (out, in) float64.
        scale: (out, in), of every weight.
        inputs: (in, in), `compensation` of the inputs' second moment.
        bits: 8, 4 or 3.

    Returns:
        The integers, (out, in) float64.
    """
    # Transposed, so that an input's weights lie together.
    remaining, scale = weight.t().contiguous(), scale.t().contiguous()
    values = torch.empty_like(remaining)
    for start in range(0, len(remaining), _BLOCK):
        block = remaining[start : start + _BLOCK]
        end = start + len(block)
        errors = torch.empty_like(block)
        for i, column in enumerate(block):
            row = inputs[start + i]
            values[start + i] = to_grid(column, scale[start + i], bits)
            errors[i] = (column - values[start + i] * scale[start + i]) / row[start + i]
            block[i + 1 :].addr_(row[start + i + 1 : end], errors[i], alpha=-1)
        remaining[end:].addmm_(inputs[start:end, end:].t(), errors, alpha=-1)
    return values.t()


def round_both(weight: Tensor, scale: Tensor, inputs: Tensor, outputs: Tensor, bits: int) -> Tensor:
    """Each error made up for by later inputs and by later outputs (Tseng et al., YAQA, 2025).

    With E the rounded weight's error, L_O and L_I the unit triangular factors of the two moments, the residuals of
    rounding are L_O^T E L_I, and the sum of their squares, each times both pivots, is what round_inputs makes small for
    one output alone.

    Args:
        weight: (out, in) float64.
        scale: (out, in), of every weight.
        inputs: (in, in), `compensation` of the inputs' second moment.
        outputs: (out, out), likewise of the outputs'.
        bits: 8, 4 or 3.

    Returns:
        The integers, (out, in) float64.
    """
    along, across = _unit(inputs), _unit(outputs)
    remaining = weight.clone()
    values = torch.empty_like(weight)
    for start in range(0, len(weight), _BLOCK):
        rows = slice(start, start + _BLOCK)
        errors = _round_rows(remaining[rows], scale[rows], along, across[rows, rows], bits, values[rows])
        later = slice(rows.stop, None)
        remaining[later].addmm_(across[rows, later].t(), errors, alpha=-1)
    return values


def _round_rows(weight: Tensor, scale: Tensor, along: Tensor, across: Tensor, bits: int, values: Tensor) -> Tensor:
    """Rounds some outputs into `values`; returns what later outputs make up for."""
    owed = torch.zeros_like(weight)  # by each weight, for errors of inputs before it
    residuals = torch.empty_like(weight)
    low, high = LIMITS[bits]
    for start in range(0, weight.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        tile = weight[:, columns], scale[:, columns], owed[:, columns], along[columns, columns], across
        values[:, columns], residuals[:, columns] = round_tile(*tile, low, high)
        owed[:, start:].addmm_(residuals[:, columns], along[columns, start:])
    return owed.add_(residuals)


def _unit(factor: Tensor) -> Tensor:
    """Every row over its diagonal element, which is left out: what an error does to those behind it."""
    return (factor / factor.diagonal()[:, None]).triu(1)
