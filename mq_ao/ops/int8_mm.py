"""`mq_ao::int8_mm`: the exact product of two int8 matrices, whatever their shape.

`aten._int_mm` on CUDA takes more than 16 rows, and inner and outer sizes that are multiples of 8. This operator is
where that choice is made: other shapes are padded with zeros, which change no sum. A kernel of our own for few rows
(decode) can take its place later.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mq_ao.ops import library
from mq_ao.ops.library import require

_MIN_ROWS = 17
_MULTIPLE = 8
# Sums of 2^16 products, and corrections of zero points on top of them, stay within 32 bits.
_MAX_INPUTS = 65536


def _check(a: Tensor, b: Tensor) -> None:
    require(
        a.dim() == b.dim() == 2 and a.dtype == b.dtype == torch.int8,
        f"int8_mm takes two int8 matrices, not {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}.",
    )
    require(
        a.shape[1] == b.shape[0],
        f"int8_mm takes matrices (M, K) and (K, N), not {tuple(a.shape)} and {tuple(b.shape)}.",
    )
    require(a.shape[1] <= _MAX_INPUTS, f"int8_mm sums up to {_MAX_INPUTS} products, not {a.shape[1]}.")


def padded_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product through `aten._int_mm`, on shapes that its CUDA kernel takes. This was not run on a GPU.

    Rows are padded to 17, inner and outer sizes to the next multiple of 8; `a` becomes row-major, and `b` column-major
    where it is padded: how `weight.t()` lies.

    Args:
        a: int8 (M, K).
        b: int8 (K, N).

    Returns:
        int32 (M, N).
    """
    (m, k), n = a.shape, b.shape[1]
    rows, inner, outer = max(0, _MIN_ROWS - m), -k % _MULTIPLE, -n % _MULTIPLE
    if rows or inner:
        a = pad(a, (0, inner, 0, rows))
    if inner or outer:
        b = pad(b.t(), (0, inner, 0, outer)).t()
    y = torch.ops.aten._int_mm(a.contiguous(), b)
    return y.narrow(0, 0, m).narrow(1, 0, n) if rows or outer else y


def _reference(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    if a.device.type == "cuda":
        return padded_mm(a, b).contiguous()
    # Whole numbers below 2^53: a float64 product is exact whatever its order.
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)


def _fake(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


library.define("int8_mm", "(Tensor a, Tensor b) -> Tensor", fake=_fake, reference=_reference)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of two int8 matrices.

    On CUDA it is `padded_mm`, which was not run on a GPU; elsewhere a float64 product.

    Args:
        a: int8 (M, K), K up to 65536.
        b: int8 (K, N); `weight.t()` of a row-major (N, K) is what CUDA reads best.

    Returns:
        int32 (M, N).

    Raises:
        MqAoError: a dtype or a shape is not as above.
    """
    return torch.ops.mq_ao.int8_mm(a, b)
