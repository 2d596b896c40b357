"""int4 weights, two in a byte, as GPU kernels read them.

The weights of a group lie in half as many bytes: the first half of the group in the low four bits, the second half in
the high ones. So a kernel multiplies each half as it lies, without moving values between threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require


def pack(weight: Tensor, group_size: int) -> Tensor:
    """Packs int4 weights.

    Args:
        weight: int8 (N, K) within -8..7.
        group_size: an even divisor of K.

    Returns:
        uint8 (N, K / 2).

    Raises:
        MqAoError: a value or a size is not as above.
    """
    n, k = weight.shape
    require(
        group_size > 0 and group_size % 2 == 0 and k % group_size == 0,
        f"groups of {group_size} weights do not divide the {k} inputs into even parts: choose a size that does.",
    )
    require(bool(((weight >= -8) & (weight <= 7)).all()), "int4 weights lie in -8..7.")
    low, high = weight.view(n, -1, 2, group_size // 2).to(torch.uint8).unbind(2)
    return ((low & 15) | (high << 4)).reshape(n, k // 2)


def unpack(packed: Tensor, group_size: int) -> Tensor:
    """The int8 (N, K) that `pack` was given.

    Args:
        packed: uint8 (N, K / 2).
        group_size: as for `pack`.
    """
    groups = packed.view(packed.shape[0], -1, group_size // 2)
    both = torch.stack((groups & 15, groups >> 4), 2).to(torch.int8)
    return ((both ^ 8) - 8).reshape(packed.shape[0], -1)
