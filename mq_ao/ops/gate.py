"""`mq_ao::gate`: the block's gate and the online rotation in one pass, in floats.

x = y * z * sigmoid(s * z)      (S-SiLU, docs/method.md, S2; s absent: y * SiLU(z))
x = x @ hadamard_matrix.matrix(n)   if the input of out_proj is rotated (docs/method.md, R2)

`mq_ao::qgate` quantizes as well; this one is for backends that quantize for themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.hadamard import check_order, rotate
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator


def check_pair(takes: str, y: Tensor, z: Tensor) -> None:
    """Raises MqAoError, which begins with "takes", unless y and z have one shape (..., n)."""
    message = f"{takes} y and z of one shape (..., n), not {tuple(y.shape)} and {tuple(z.shape)}."
    require(y.dim() >= 1 and y.dim() == z.dim(), message)
    for size, other in zip(y.shape, z.shape, strict=True):
        require(size == other, message)
    require(y.shape[-1] > 0, "a gate needs at least one value in a row, but the last axis is empty.")


def check_rows(a: Operands) -> None:
    """Raises MqAoError unless y and z have one shape (..., n), and s and the rotation fit n."""
    y, s = a.y, a.s
    check_pair("a gate takes", y, a.z)
    if s is not None:
        require(
            s.dtype == torch.float32 and s.dim() == 1 and s.shape[0] == y.shape[-1],
            f"s must be a float32 vector of {y.shape[-1]} values, not {s.dtype} {tuple(s.shape)}.",
        )
    if a.hadamard:
        check_order(y)


def gated(y: Tensor, z: Tensor, s: Tensor | None, hadamard: bool) -> Tensor:
    """The gate of float32 y and z (..., n), rotated if asked: float32 (..., n), contiguous."""
    x = y * (z * torch.sigmoid(z if s is None else s * z))
    return rotate(x) if hadamard else x.contiguous()


def _results(a: Operands) -> Tensor:
    check_rows(a)
    for name, x in (("y", a.y), ("z", a.z)):
        require(x.dtype == torch.float32, f"gate: {name} must be float32, it is {x.dtype}.")
    return like(a.y)


@operator(results=_results)
def gate(y: Tensor, z: Tensor, s: Tensor | None = None, hadamard: bool = False) -> Tensor:
    """Gates and rotates rows.

    Args:
        y: (..., n), float32; rows may be strided.
        z: as `y`, of the same shape.
        s: smoothing of the gate, float32 (n,); None stands for ones.
        hadamard: whether to rotate; then n is an order that `hadamard_matrix.factor` takes.

    Returns:
        float32 (..., n), contiguous.

    Raises:
        MqAoError: a dtype or a shape is not as above.
    """
    return gated(y, z, s, hadamard)
