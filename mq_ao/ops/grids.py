"""Grids of 8-bit activations: the value of q is `(q - zero_point) * scale`, and the dtype of q says which q there are.

XNNPACK knows int8 alone and x86 kernels uint8 alone, so operators take both. int8 numbers and their zero points are
uint8 ones less 128, and give the same results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands

BYTES = (torch.uint8, torch.int8)


@dataclass(frozen=True)
class Grid:
    """The values of integers q, `(q - zero_point) * scale`; without a scale, floats stay as they are."""

    scale: float | None = None
    zero_point: int = 0

    @classmethod
    def of(cls, a: Operands, name: str) -> Grid:
        """The operands `<name>_scale` and `<name>_zero_point`."""
        return cls(getattr(a, f"{name}_scale"), getattr(a, f"{name}_zero_point"))


FLOATS = Grid()
"""Of values that lie on no grid."""


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    """Smallest and largest integer of an 8-bit dtype."""
    return (0, 255) if dtype == torch.uint8 else (-128, 127)


def check_grid(label: str, dtype: torch.dtype, grid: Grid) -> None:
    """Raises MqAoError unless a grid has a scale and fits 8-bit `dtype`; `label` names the operand."""
    low, high = _limits(dtype)
    require(grid.scale is not None and grid.scale > 0, f"{label}_scale must be positive, it is {grid.scale}.")
    require(
        low <= grid.zero_point <= high,
        f"{label}_zero_point must lie in {low}..{high} for {dtype}, it is {grid.zero_point}.",
    )


def check_operand(operator: str, a: Operands, name: str) -> None:
    """Raises MqAoError on an operand that `dequantize` does not take with its grid."""
    q = getattr(a, name)
    require(
        q.dtype in (*BYTES, torch.float32),
        f"{operator}: {name} must be uint8, int8 or float32, it is {q.dtype}.",
    )
    if q.dtype != torch.float32:
        check_grid(f"{operator}: {name}", q.dtype, Grid.of(a, name))


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Values of an operand in float32.

    Args:
        q: uint8, int8 or float32, of any shape.
        grid: of q; not looked at for float32.
    """
    if q.dtype == torch.float32 or grid.scale is None:
        return q
    return (q.to(torch.float32) - grid.zero_point) * grid.scale


def output_dtype(like: Tensor, out: Grid) -> torch.dtype:
    """Dtype of an output: float32 without a scale; with one int8 if operand `like` is int8, else uint8."""
    if out.scale is None:
        return torch.float32
    return torch.int8 if like.dtype == torch.int8 else torch.uint8


def check_output(operator: str, like: Tensor, out: Grid) -> None:
    """Raises MqAoError where an operator cannot round its output, of `output_dtype`, as asked."""
    if out.scale is not None:
        check_grid(f"{operator}: out", output_dtype(like, out), out)


def check_grids(operator: str, a: Operands, names: tuple[str, ...]) -> Grid:
    """Checks operands with their grids, and that of the output, which is rounded like the first; returns that one."""
    out = Grid.of(a, "out")
    for name in names:
        check_operand(operator, a, name)
    check_output(operator, getattr(a, names[0]), out)
    return out


def requantize(y: Tensor, dtype: torch.dtype, out: Grid) -> Tensor:
    """Rounds as `quantized_decomposed.quantize_per_tensor`, NaN to the smallest integer; `y` itself without a scale."""
    if out.scale is None:
        return y
    low, high = _limits(dtype)
    # Times the reciprocal, which is rounded to float32.
    q = torch.round(y * (1.0 / out.scale)) + out.zero_point
    return q.clamp(low, high).nan_to_num(float(low)).to(dtype)
