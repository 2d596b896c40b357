"""Rows of tensors, as kernels read them."""

from __future__ import annotations

from torch import Tensor

# Values of a program: short rows share one, and each long one takes more threads.
TILE = 1024
LONG = 4096
LARGEST_ROW = 16384


def matrix(x: Tensor) -> Tensor:
    """Rows (count, n) of x (..., n), whose values lie next to each other: a view wherever x allows it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
