"""Hadamard rotations in Triton kernels: small matrices on tensor cores, one for each factor of the order.

A row of n = b * k1 * k2 values, as an array (b, k1, k2), is multiplied along each axis by a Hadamard matrix: the
powers of two by Sylvester's, made in registers, and b by `hadamard_matrix.matrix`'s base, which is loaded. b is padded
to a power of two: the row's tail, which is zero.

Tensor cores keep 11 bits of a factor. Entries are 1 and -1, so two products, with the upper and the lower bits of the
values, are exact to 2^-21.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.hadamard_matrix import base, factor, sylvester

# Tiles of dot products have at least this many rows and columns.
_SMALLEST = 16
_LARGEST_BASE = 64
# Twice as large, both parts of a row take more than the 99 KB of shared memory of compute capability 8.6.
_LARGEST_ROW = 8192
# The powers of two by their logarithm; 1 to 3 and 7 are in none of these, and go to the base.
_POWERS = {0: (1, 1), 4: (16, 1), 5: (32, 1), 6: (64, 1), 8: (16, 16), 9: (32, 16), 10: (32, 32)}


@dataclass(frozen=True)
class Rotation:
    """How a row is rotated.

    Attributes:
        order: n.
        base: order of the matrix that is loaded.
        padded: the power of two that it is padded to.
        first, second: orders of the others; 1 for none.
    """

    order: int
    base: int
    padded: int
    first: int
    second: int

    @property
    def size(self) -> int:
        """Values of a padded row."""
        return self.padded * self.first * self.second

    @property
    def rows(self) -> int:
        """Rows that give each product enough of them."""
        return triton.cdiv(_SMALLEST * max(self.padded, self.first, self.second), self.size)

    def matrix(self, device: torch.device) -> Tensor:
        """The matrix that is loaded, float32 (padded, padded), of 1 and -1, and 0 beyond `base`."""
        return _matrix(self.order, self.base, self.padded, device)


@functools.cache
def rotation(n: int) -> Rotation | None:
    """The rotation of order n that adds least to a row and then takes the fewest products; None if a row is too large.

    Raises:
        Unsuitable: no Hadamard matrix of order n can be made.
    """
    m, power = factor(n)
    found = []
    for logarithm, (first, second) in _POWERS.items():
        rest = power >> logarithm
        if rest << logarithm == power and m * rest <= _LARGEST_BASE:
            padded = max(triton.next_power_of_2(m * rest), _SMALLEST)
            found.append(Rotation(n, m * rest, padded, first, second))
    best = min(found, key=lambda r: (r.size, r.padded + r.first + r.second), default=None)
    return best if best is not None and best.size <= _LARGEST_ROW else None


@functools.cache
def _matrix(n: int, order: int, padded: int, device: torch.device) -> Tensor:
    m, _ = factor(n)
    values = torch.zeros(padded, padded)
    values[:order, :order] = torch.kron(base(m), sylvester(order // m))
    return values.to(device)


@triton.jit
def _upper(x):
    """x with the bits that tensor cores keep of a float32."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _along_last(x, matrix, ROWS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr):
    """Multiplies the last axis of (ROWS, SIZE / K, K), and makes it the second one; x is (ROWS, SIZE)."""
    x = tl.reshape(x, (ROWS * SIZE // K, K))
    upper = _upper(x)
    lower = tl.dot(_upper(x - upper), matrix, input_precision="tf32")
    x = tl.dot(upper, matrix, lower, input_precision="tf32")
    x = tl.permute(tl.reshape(x, (ROWS, SIZE // K, K)), (0, 2, 1))
    return tl.reshape(x, (ROWS, SIZE))


@triton.jit
def _sylvester(K: tl.constexpr):
    """Sylvester's matrix of an order up to 64: -1 to the number of bits that row and column share."""
    index = tl.arange(0, K)
    bits = index[:, None] & index[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def rotate_rows(x, base_matrix, norm, ROWS: tl.constexpr, B: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """x (ROWS, B * FIRST * SECOND), float32, times the Hadamard matrix and `norm`; 0 beyond the row, before and after.

    Args:
        x: rows.
        base_matrix: pointer to `Rotation.matrix`.
        norm: 1 / sqrt(n).
        ROWS: at least `Rotation.rows`; a power of two.
        B: `Rotation.padded`.
        FIRST: `Rotation.first`.
        SECOND: `Rotation.second`.
    """
    SIZE: tl.constexpr = B * FIRST * SECOND
    if SECOND > 1:
        x = _along_last(x, _sylvester(SECOND), ROWS, SIZE, SECOND)
    if FIRST > 1:
        x = _along_last(x, _sylvester(FIRST), ROWS, SIZE, FIRST)
    index = tl.arange(0, B)
    matrix = tl.load(base_matrix + index[:, None] * B + index[None, :])
    return _along_last(x, matrix, ROWS, SIZE, B) * norm
