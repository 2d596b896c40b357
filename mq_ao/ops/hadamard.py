"""`mq_ao::hadamard`: the online rotation, by a fast Walsh-Hadamard transform (docs/method.md, section 4).

y = (x * scale) @ hadamard_matrix.matrix(n)   over the last axis, of size n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mq_ao.ops import hadamard_matrix
from mq_ao.ops.library import require, schemas
from mq_ao.ops.operator import Operands, like, operator


def check_order(x: Tensor) -> int:
    """The size of the last axis of `x`, for which there is a Hadamard matrix; raises MqAoError otherwise."""
    require(x.dim() >= 1, "a Hadamard rotation takes x of shape (..., n), not a scalar.")
    n = int(x.shape[-1])
    require(n > 0, "a Hadamard rotation needs at least one value in a row, but the last axis of x is empty.")
    hadamard_matrix.factor(n)
    return n


def rotate(x: Tensor) -> Tensor:
    """`x @ matrix(n)` as a dense product in float64, rounded to the dtype of `x` (..., n); contiguous."""
    matrix = hadamard_matrix.matrix(x.shape[-1]).to(x.device)
    return (x.to(torch.float64) @ matrix).to(x.dtype).contiguous()


def _results(a: Operands) -> Tensor:
    x, scale = a.x, a.scale
    require(x.is_floating_point(), f"hadamard: x must be floating point, it is {x.dtype}.")
    n = check_order(x)
    if scale is not None:
        require(
            scale.is_floating_point() and scale.dim() == 1 and scale.shape[0] == n,
            f"hadamard: scale must be a floating point vector of {n} values, not {scale.dtype} {tuple(scale.shape)}.",
        )
    return like(x)


@operator(results=_results)
def hadamard(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Rotates the last axis of `x` by the orthonormal Hadamard matrix of its size.

    The native kernel, for float32 and bfloat16, computes in float32 with O(n log n) additions a row; results do not
    depend on the number of threads. Other dtypes are dense products in float64.

    Args:
        x: (..., n), floating point; n as `hadamard_matrix.factor` takes it.
        scale: (n,), floating point, multiplied to `x` first; or None.

    Returns:
        (..., n), contiguous, of the dtype of `x`.

    Raises:
        MqAoError: no Hadamard matrix of order n is known, or a dtype or a shape is not as above.
    """
    if scale is None:
        return rotate(x)
    return rotate(x.to(torch.float64) * scale).to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, scale = ctx.saved_tensors
    back = dy @ hadamard_matrix.matrix(x.shape[-1]).to(dy).t()
    if scale is None:
        return back, None
    return back * scale, (back * x).flatten(0, -2).sum(0).to(scale.dtype)


torch.library.register_autograd("mq_ao::hadamard", _autograd, setup_context=_setup_context, lib=schemas)
