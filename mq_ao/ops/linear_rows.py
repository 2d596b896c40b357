"""`mq_ao::linear_rows` and `linears_rows`: linear layers on int8 activations and row-major weights, as GPUs read them.

Sums are exact in 32 bits; zero point, scales, bias and the optional requantization are a float32 epilogue whose order
of operations the reference defines. x86 has `linear_packed`, on packed weights and unsigned activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.grids import FLOATS, Grid, check_grid, requantize
from mq_ao.ops.library import require
from mq_ao.ops.nibbles import unpack
from mq_ao.ops.operator import Operands, like, operator

MOST_PIECES = 3
# Sums of 2^16 products, and corrections of zero points on top of them, stay within 32 bits.
MAX_INPUTS = 65536


def check_weight(x: Tensor, a: Operands) -> None:
    """Raises MqAoError unless a row-major weight of int8, or of packed int4, fits its scales and x (..., K)."""
    k, weight, scale, group_size = x.shape[-1], a.weight, a.scale, a.group_size
    four = weight.dtype == torch.uint8
    require(
        weight.dim() == 2 and (four or weight.dtype == torch.int8) and weight.is_contiguous(),
        f"a weight is contiguous int8 (N, K), or uint8 (N, K / 2) of packed int4, not {weight.dtype} "
        f"{tuple(weight.shape)}.",
    )
    inputs = weight.shape[1] * (2 if four else 1)
    require(inputs == k, f"the weight has {inputs} inputs and x has {k}: they must be equal.")
    require(k <= MAX_INPUTS, f"linear_rows sums up to {MAX_INPUTS} products, not {k}.")
    require(group_size > 0 or not four, "int4 weights come in groups: give group_size.")
    require(
        group_size == 0 or k % group_size == 0,
        f"groups of {group_size} weights do not divide the {k} inputs: choose a size that does.",
    )
    shape = (weight.shape[0], k // group_size) if group_size else (weight.shape[0],)
    good = scale.dtype == torch.float32 or (group_size > 0 and scale.dtype == torch.bfloat16)
    require(
        good and tuple(scale.shape) == shape and scale.is_contiguous(),
        f"the weight's scale must be contiguous float32 {shape}, or bfloat16 with groups, it is {scale.dtype} "
        f"{tuple(scale.shape)}.",
    )
    if a.bias is not None:
        require(
            a.bias.dtype == torch.float32 and tuple(a.bias.shape) == (weight.shape[0],),
            f"bias must be float32 ({weight.shape[0]},), it is {a.bias.dtype} {tuple(a.bias.shape)}.",
        )


def integers(weight: Tensor, group_size: int) -> Tensor:
    """The integers of a weight: int8 (N, K), from int8 or packed int4."""
    return unpack(weight, group_size) if weight.dtype == torch.uint8 else weight


def scaled(sums: Tensor, token_scale: Tensor | None, scale: Tensor, correction: Tensor | None) -> Tensor:
    """int32 sums (..., N) in float32: less the correction, times the scales."""
    if correction is not None:
        sums = sums - correction
    return sums.to(torch.float32) * (scale if token_scale is None else scale * token_scale)


def finished(y: Tensor, bias: Tensor | None, out: Grid) -> Tensor:
    """y (..., N) plus the bias, rounded if asked."""
    return requantize(y if bias is None else y + bias, torch.int8, out)


def _check(a: Operands, out: Grid) -> None:
    q, scale, token_scale, correction = a.q, a.scale, a.token_scale, a.correction
    require(q.dtype == torch.int8 and q.dim() >= 1, f"linear_rows takes int8 (..., K), not {q.dtype} {tuple(q.shape)}.")
    check_weight(q, a)
    if token_scale is not None:
        message = (
            f"token_scale must be float32 with one value for each token, {(*q.shape[:-1], 1)}, it is "
            f"{token_scale.dtype} {tuple(token_scale.shape)}."
        )
        require(token_scale.dtype == torch.float32 and token_scale.dim() == q.dim(), message)
        for size, wanted in zip(token_scale.shape, (*q.shape[:-1], 1), strict=True):
            require(size == wanted, message)
    if correction is not None:
        require(
            correction.dtype == torch.int32 and correction.shape == scale.shape and correction.is_contiguous(),
            f"correction must be contiguous int32 {tuple(scale.shape)}, it is {correction.dtype} "
            f"{tuple(correction.shape)}.",
        )
    if out.scale is not None:
        check_grid("linear_rows: out", torch.int8, out)


def _results(a: Operands) -> Tensor:
    _check(a, Grid.of(a, "out"))
    dtype = torch.float32 if a.out_scale is None else torch.int8
    return like(a.q, (*a.q.shape[:-1], a.weight.shape[0]), dtype)


@operator(results=_results)
def linear_rows(
    q: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None = None,
    bias: Tensor | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    group_size: int = 0,
) -> Tensor:
    """`y = sum over groups of (q @ weight.T - correction) * (scale * token_scale), + bias`, then rounding.

    Args:
        q: int8 (..., K), K up to 65536.
        token_scale: float32 (..., 1), the step of each token of q; None: it is in `scale`.
        weight: int8 (N, K), or uint8 (N, K / 2) from `nibbles.pack`; contiguous.
        scale: float32 (N,); with groups float32 or bfloat16 (N, K / group_size).
        correction: int32 of the shape of `scale`: q's zero point times the sums of the weight's rows, in each group;
            None: the zero point is 0.
        bias: float32 (N,), or None.
        out_scale: None for float32 output; else y is rounded to int8 as by `quantized_decomposed.quantize_per_tensor`.
        out_zero_point: within -128..127.
        group_size: inputs that share a scale; it divides K. 0: all of them.

    Returns:
        float32 (..., N), or int8 with `out_scale`.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    # Whole numbers below 2^53: a float64 product is exact whatever its order.
    values = integers(weight, group_size).to(torch.float64)
    size = group_size or q.shape[-1]
    # One column for each group.
    scales = scale.to(torch.float32).view(len(scale), -1)
    corrections = None if correction is None else correction.view(len(scale), -1)
    y = None
    for group, (part, columns) in enumerate(zip(q.split(size, -1), values.split(size, 1), strict=True)):
        sums = (part.to(torch.float64) @ columns.t()).to(torch.int32)
        less = None if corrections is None else corrections[:, group]
        term = scaled(sums, token_scale, scales[:, group], less)
        y = term if y is None else y + term
    assert y is not None
    return finished(y, bias, Grid(out_scale, out_zero_point))


def _pieces(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    n, sizes, out_scales, out_zero_points = a.weight.shape[0], a.sizes, a.out_scales, a.out_zero_points
    require(
        1 <= len(sizes) <= MOST_PIECES and len(sizes) == len(out_scales) == len(out_zero_points),
        f"linears_rows gives 1 to {MOST_PIECES} pieces, each with a size, a scale and a zero point, not {len(sizes)}, "
        f"{len(out_scales)} and {len(out_zero_points)} of these.",
    )
    require(min(sizes) > 0 and sum(sizes) == n, f"pieces of {sizes} outputs do not make up the {n} of the weight.")
    for out in map(Grid, out_scales, out_zero_points):
        if out.scale:
            check_grid("linears_rows: out", torch.int8, out)
    _check(a, FLOATS)
    dtypes = [torch.int8 if out_scale else torch.float32 for out_scale in out_scales]
    given = [like(a.q, (*a.q.shape[:-1], size), dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    first, second, third = given + [like(a.q, (0,), torch.float32) for _ in range(MOST_PIECES - len(given))]
    return first, second, third


@operator(results=_pieces)
def linears_rows(
    q: Tensor,
    token_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    out_scales: list[float],
    out_zero_points: list[int],
    group_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_rows` with its outputs in pieces, each of which is rounded or not.

    Args:
        q, token_scale, weight, scale, correction, bias, group_size: as in `linear_rows`.
        sizes: outputs of each piece, at most three; they sum to N.
        out_scales: of each piece; 0: it stays float32.
        out_zero_points: of each piece, within -128..127.

    Returns:
        Three tensors (..., size), contiguous, float32 or int8; empty ones (0,) for pieces that there are not.

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    y = linear_rows.reference(q, token_scale, weight, scale, correction, bias, None, 0, group_size)
    given = [
        requantize(piece, torch.int8, Grid(out_scale or None, zero_point)).contiguous()
        for piece, out_scale, zero_point in zip(y.split(sizes, -1), out_scales, out_zero_points, strict=True)
    ]
    first, second, third = given + [y.new_empty(0) for _ in range(MOST_PIECES - len(given))]
    return first, second, third
