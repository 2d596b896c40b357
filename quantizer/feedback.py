"""Greedy rounding with feedback: each error is made up for by the weights that are still to be rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.quantizer.weights import to_grid

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
        bits: 4 or 8.

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
    one output alone. A weight can be rounded once those before it in both axes are: all on an antidiagonal at once.

    Args:
        weight: (out, in) float64.
        scale: (out, in), of every weight.
        inputs: (in, in), `compensation` of the inputs' second moment.
        outputs: (out, out), likewise of the outputs'.
        bits: 4 or 8.

    Returns:
        The integers, (out, in) float64.
    """
    along, across = _unit(inputs), _unit(outputs)
    remaining = weight.clone()
    values = torch.empty_like(weight)
    for start in range(0, len(weight), _BLOCK):
        rows = slice(start, start + _BLOCK)
        # Last output first, so that an antidiagonal of outputs and inputs is a diagonal of the block.
        local = across[rows, rows].flip(0, 1).t().contiguous()
        errors = _round_block(
            *(remaining[rows].flip(0), scale[rows].flip(0).contiguous(), values[rows], along, local, bits)
        )
        later = slice(rows.stop, None)
        remaining[later].addmm_(across[rows, later].t(), errors.flip(0), alpha=-1)
    return values


def _round_block(remaining: Tensor, scale: Tensor, values: Tensor, along: Tensor, across: Tensor, bits: int) -> Tensor:
    """Rounds some outputs, last one first, into `values`; returns the errors that later outputs make up for."""
    height, inputs = remaining.shape
    rounded = torch.empty_like(remaining)
    owed = torch.zeros_like(remaining)  # by each weight, for errors of inputs before it
    residuals = torch.empty_like(remaining)
    for start in range(0, inputs, _BLOCK):
        columns = slice(start, min(start + _BLOCK, inputs))
        width = columns.stop - start
        block = tuple(tensor[:, columns] for tensor in (remaining, scale, owed, residuals, rounded))
        left, size, owing, residual, integers = block
        local = along[columns, columns].contiguous()
        for offset in range(1 - height, width):
            first, last = max(0, -offset), min(height, width - offset)
            row, column = slice(first, last), slice(first + offset, last + offset)
            wanted = left.diagonal(offset) - owing.diagonal(offset)
            chosen = to_grid(wanted, size.diagonal(offset), bits)
            error = wanted - chosen * size.diagonal(offset)
            integers.diagonal(offset).copy_(chosen)
            residual.diagonal(offset).copy_(error)
            left[:, column].addcmul_(across[:, row], (owing.diagonal(offset) + error)[None], value=-1)
            owing[row].addcmul_(local[column], error[:, None])
        rest = slice(columns.stop, None)
        owed[:, rest].addmm_(residuals[:, columns], along[columns, rest])
    values.copy_(rounded.flip(0))
    return owed.add_(residuals)


def _unit(factor: Tensor) -> Tensor:
    """Every row over its diagonal element, which is left out: what an error does to those behind it."""
    return (factor / factor.diagonal()[:, None]).triu(1)
