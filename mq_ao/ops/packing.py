"""`mq_ao::linear_prepack` and `mq_ao::linear_unpack`: 8-bit and 4-bit weights as the linear kernels read them.

One packed copy serves `linear_packed`, `linear_packed_per_token` and `linear_packed_weight_only`, for one row (decode)
and for many (prefill).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator

_PANEL = 64
_LANE = 16
_MAX_INPUTS = 65536
_RANGES = {8: (-128, 127), 4: (-8, 7)}


def _padded(n: int, k: int, bits: int) -> tuple[int, int]:
    unit = _LANE * 8 // bits
    return (n + unit - 1) // unit * unit, (k + 3) // 4 * 4


def group_count(k: int, group_size: int) -> int:
    """Number of groups of `group_size` inputs, of which the last may be shorter; 0 is one group of all."""
    return (k + group_size - 1) // group_size if group_size else 1


def packed_bytes(n: int, k: int, bits: int = 8, group_size: int = 0) -> int:
    """Size in bytes of the packed weights of a layer with `n` outputs and `k` inputs."""
    padded_n, padded_k = _padded(n, k, bits)
    return padded_n * padded_k * bits // 8 + padded_n * 4 * group_count(k, group_size)


def check_layout(n: int, k: int, bits: int, group_size: int) -> None:
    """Raises MqAoError unless a linear with `n` outputs and `k` inputs can be packed so."""
    require(
        n >= 1 and 1 <= k <= _MAX_INPUTS,
        f"a quantized linear layer has 1 to {_MAX_INPUTS} inputs and at least 1 output, not {k} and {n}.",
    )
    require(bits in _RANGES, f"weights of a quantized linear layer have 8 or 4 bits, not {bits}.")
    require(
        group_size >= 0 and group_size % 4 == 0,
        f"group_size must be a multiple of 4, or 0 for one scale for each output, not {group_size}.",
    )


def _check_packed(packed: Tensor, n: int, k: int, bits: int, group_size: int) -> None:
    check_layout(n, k, bits, group_size)
    size = packed_bytes(n, k, bits, group_size)
    require(
        packed.dtype == torch.int8 and packed.is_contiguous() and packed.numel() == size,
        f"packed weights of {n} outputs, {k} inputs, {bits} bits and group_size {group_size} are {size} contiguous "
        f"int8 bytes, not {packed.numel()} of {packed.dtype}: make them with linear_prepack.",
    )


def _check_vector(vector: Tensor, n: int, name: str) -> None:
    require(
        vector.dtype == torch.float32 and tuple(vector.shape) == (n,) and vector.is_contiguous(),
        f"{name} must be a contiguous float32 vector of {n} values, not {vector.dtype} {tuple(vector.shape)}.",
    )


def check_linear(x: Tensor, a: Operands) -> int:
    """Raises MqAoError unless `x` fits the operands that all linear operators share; returns the outputs."""
    require(x.dim() >= 1, "a quantized linear layer takes x of shape (..., inputs), not a scalar.")
    scale = a.weight_scale
    require(scale.dim() >= 1, "weight_scale must have a value for each output, it is a scalar.")
    n: int = scale.shape[0]
    k = x.shape[-1]
    _check_packed(a.packed, n, k, a.bits, a.group_size)
    if a.group_size:
        groups = group_count(k, a.group_size)
        require(
            scale.dtype == torch.float32 and tuple(scale.shape) == (n, groups),
            f"weight_scale must be float32 ({n}, {groups}) with group_size {a.group_size}, not {scale.dtype} "
            f"{tuple(scale.shape)}.",
        )
    else:
        _check_vector(scale, n, "weight_scale")
    if a.bias is not None:
        _check_vector(a.bias, n, "bias")
    return n


def _packed(a: Operands) -> Tensor:
    weight = a.weight
    require(
        weight.dim() == 2 and weight.dtype == torch.int8,
        f"linear_prepack takes an int8 weight of shape (outputs, inputs), not {weight.dtype} {tuple(weight.shape)}.",
    )
    n, k = weight.shape
    check_layout(n, k, a.bits, a.group_size)
    return like(weight, (packed_bytes(n, k, a.bits, a.group_size),))


@operator(results=_packed)
def linear_prepack(weight: Tensor, bits: int = 8, group_size: int = 0) -> Tensor:
    """Packs int8 weights (outputs, inputs) for the three operators `linear_packed`, `..._per_token`, `..._weight_only`.

    Args:
        weight: int8 (N, K), within -8..7 for 4 bits.
        bits: 8 or 4, the bits that a packed weight takes.
        group_size: inputs that share a scale, a multiple of 4; 0: all. The operators must be given the same.

    Returns:
        int8 (`packed_bytes(N, K, bits, group_size)`,): panels of 64 outputs, then for each panel the int32 sum of every
        group's weights, laid out as qgemm_layout.h says.

    Raises:
        MqAoError: `weight` is not int8, not 2-D, empty, has more than 65536 inputs or values out of range, or
            `bits` or `group_size` is none of the above.
    """
    low, high = _RANGES[bits]
    require(
        bool((weight >= low).all() and (weight <= high).all()),
        f"weights of {bits} bits lie in {low}..{high}, not in {weight.min()}..{weight.max()}.",
    )
    n, k = weight.shape
    padded_n, padded_k = _padded(n, k, bits)
    padded = torch.nn.functional.pad(weight, (0, padded_k - k, 0, padded_n - n))
    # (inputs / 4, width, 4) of each panel.
    panels = [panel.reshape(len(panel), -1, 4).transpose(0, 1) for panel in padded.split(_PANEL)]
    if bits == 4:
        pairs = [panel.reshape(padded_k // 4, -1, 2, _LANE, 4) for panel in panels]
        panels = [pair[:, :, 0] & 15 | pair[:, :, 1] << 4 for pair in pairs]
    groups = padded.split(group_size or padded_k, 1)
    sums = torch.stack([group.sum(1, dtype=torch.int32) for group in groups]).split(_PANEL, 1)
    return torch.cat([*(panel.reshape(-1) for panel in panels), *(each.reshape(-1).view(torch.int8) for each in sums)])


def _unpacked(a: Operands) -> Tensor:
    _check_packed(a.packed, a.n, a.k, a.bits, a.group_size)
    return like(a.packed, (a.n, a.k))


@operator(results=_unpacked)
def linear_unpack(packed: Tensor, n: int, k: int, bits: int = 8, group_size: int = 0) -> Tensor:
    """The int8 weight (n, k) that `linear_prepack` packed with the same `bits` and `group_size`."""
    padded_n, padded_k = _padded(n, k, bits)
    panels = packed[: padded_n * padded_k * bits // 8].split(_PANEL * padded_k * bits // 8)
    quads = [panel.reshape(padded_k // 4, -1, 4) for panel in panels]
    if bits == 4:
        pairs = [quad.reshape(padded_k // 4, -1, 1, _LANE, 4) for quad in quads]
        # Left shifts drop the other half of the byte, right shifts extend the sign.
        quads = [torch.cat((p << 4 >> 4, p >> 4), 2).reshape(padded_k // 4, -1, 4) for p in pairs]
    return torch.cat([quad.transpose(0, 1).reshape(-1, padded_k) for quad in quads])[:n, :k].contiguous()
