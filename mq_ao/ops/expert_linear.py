"""`mq_ao::expert_linear` and `expert_linear_packed`, `..._per_token`: a linear layer whose weight depends on the row.

Rows are sorted by their expert, and `ends` says where the rows of each end, as mixtures of experts compute it. A weight
that no row has chosen is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mq_ao.ops.library import require, schemas
from mq_ao.ops.linear_packed import linear_packed, linear_packed_per_token
from mq_ao.ops.operator import Operands, like, operator
from mq_ao.ops.packing import check_layout, group_count, packed_bytes


def _check_rows(x: Tensor, ends: Tensor) -> None:
    require(x.dim() == 2, f"rows of experts are (rows, inputs), not {tuple(x.shape)}.")
    require(
        ends.dim() == 1 and ends.dtype in (torch.int32, torch.int64) and ends.shape[0] >= 1,
        f"ends must be int32 or int64 (experts,), it is {ends.dtype} {tuple(ends.shape)}.",
    )


def _experts(ends: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of every expert that has rows."""
    begin = 0
    found = ends.tolist()
    require(
        sorted(found) == found and found[0] >= 0 and found[-1] == rows,
        f"ends must rise from 0 or more to the {rows} rows, they are {found}.",
    )
    for expert, end in enumerate(found):
        if end > begin:
            yield expert, begin, end
        begin = end


def _float(a: Operands) -> Tensor:
    _check_rows(a.x, a.ends)
    experts, (outputs, inputs) = a.ends.shape[0], a.weight.shape if a.weight.dim() == 2 else (0, 0)
    require(
        outputs > 0 and outputs % experts == 0 and inputs == a.x.shape[1] and a.weight.dtype == a.x.dtype,
        f"the weight of {experts} experts must be {a.x.dtype} ({experts} * outputs, {a.x.shape[1]}), it is "
        f"{a.weight.dtype} {tuple(a.weight.shape)}.",
    )
    return like(a.x, (a.x.shape[0], outputs // experts))


@operator(results=_float)
def expert_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`y[i] = W_e x[i]` for the rows i of every expert e.

    Args:
        x: (rows, K), floating point, sorted by expert.
        weight: (E * N, K), of x's dtype: the outputs of the first expert, then those of the second, and so on.
        ends: (E,) int32 or int64, rising: the rows of expert e are `ends[e - 1]` to `ends[e]`, those of the first begin
            at 0, and the last end is the number of rows.

    Returns:
        (rows, N), contiguous.

    Raises:
        MqAoError: shapes or dtypes are not as above, or the ends are not.
    """
    y = x.new_empty(x.shape[0], weight.shape[0] // len(ends))
    each = weight.unflatten(0, (len(ends), -1))
    for expert, begin, end in _experts(ends, len(x)):
        y[begin:end] = x[begin:end] @ each[expert].t()
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    each = weight.unflatten(0, (len(ends), -1))
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = expert_linear(dy, each.mT.flatten(0, 1), ends)
    if ctx.needs_input_grad[1]:
        dweight = torch.zeros_like(each)
        for expert, begin, end in _experts(ends, len(x)):
            dweight[expert] = dy[begin:end].t() @ x[begin:end]
        dweight = dweight.flatten(0, 1)
    return dx, dweight, None


torch.library.register_autograd("mq_ao::expert_linear", _backward, setup_context=_setup_context, lib=schemas)


def _packed(x: Tensor, a: Operands) -> Tensor:
    require(x.dtype == torch.uint8, f"expert_linear_packed takes uint8 activations, not {x.dtype}.")
    _check_rows(x, a.ends)
    experts, inputs = a.ends.shape[0], x.shape[1]
    scale = a.weight_scale
    dims = 3 if a.group_size else 2
    require(
        scale.dim() == dims and scale.dtype == torch.float32 and scale.is_contiguous() and scale.shape[0] == experts,
        f"weight_scale must be contiguous float32 ({experts}, {'groups, ' if a.group_size else ''}outputs), it is "
        f"{scale.dtype} {tuple(scale.shape)}.",
    )
    outputs = scale.shape[-1]
    check_layout(outputs, inputs, a.bits, a.group_size)
    groups = group_count(inputs, a.group_size)
    require(not a.group_size or scale.shape[1] == groups, f"{inputs} inputs are {groups} groups, not {scale.shape[1]}.")
    size = packed_bytes(outputs, inputs, a.bits, a.group_size)
    require(
        a.packed.dtype == torch.int8 and tuple(a.packed.shape) == (experts, size) and a.packed.is_contiguous(),
        f"packed weights of {experts} experts with {outputs} outputs and {inputs} inputs are contiguous int8 "
        f"({experts}, {size}), not {a.packed.dtype} {tuple(a.packed.shape)}: stack what linear_prepack gives.",
    )
    return like(x, (x.shape[0], outputs), torch.float32)


def _static(a: Operands) -> Tensor:
    require(0 <= a.x_zero_point <= 255, f"a uint8 zero point lies in 0..255, not at {a.x_zero_point}.")
    return _packed(a.x, a)


@operator(results=_static)
def expert_linear_packed(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """`linear_packed` of every expert's rows.

    Args:
        x: uint8 (rows, K), sorted by expert.
        x_scale: activation scale, rounded to float32.
        x_zero_point: within 0..255.
        packed: int8 (E, bytes): `packing.linear_prepack` of each expert's weight (N, K).
        weight_scale: float32 (E, N), or with groups (E, ceil(K / group_size), N); contiguous.
        ends: as for `expert_linear`.
        bits: 8 or 4, of the packed weights.
        group_size: inputs that share a scale, a multiple of 4; 0: all.

    Returns:
        float32 (rows, N).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    y = x.new_empty(x.shape[0], weight_scale.shape[-1], dtype=torch.float32)
    for expert, begin, end in _experts(ends, len(x)):
        scale = weight_scale[expert].t() if group_size else weight_scale[expert]
        given = (x[begin:end], x_scale, x_zero_point, packed[expert], scale)
        y[begin:end] = linear_packed.reference(*given, bits=bits, group_size=group_size)
    return y


def _per_token(a: Operands) -> Tensor:
    y = _packed(a.q, a)
    require(
        a.scale.dtype == torch.float32 and a.scale.shape == (a.q.shape[0], 1),
        f"scale must be float32 with one value for each row, {(a.q.shape[0], 1)}, not {a.scale.dtype} "
        f"{tuple(a.scale.shape)}: make it with quantize_per_token.",
    )
    return y


@operator(results=_per_token)
def expert_linear_packed_per_token(
    q: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """`linear_packed_per_token` of every expert's rows.

    Args:
        q: uint8 (rows, K), from `quantize_per_token`, sorted by expert.
        scale: float32 (rows, 1).
        packed: as for `expert_linear_packed`, and so are the others.
        weight_scale: float32 (E, N), or (E, groups, N).
        ends: (E,) int32 or int64.
        bits: 8 or 4.
        group_size: a multiple of 4, or 0.

    Returns:
        float32 (rows, N).

    Raises:
        MqAoError: a dtype, a shape or a parameter is not as above.
    """
    y = q.new_empty(q.shape[0], weight_scale.shape[-1], dtype=torch.float32)
    for expert, begin, end in _experts(ends, len(q)):
        each = weight_scale[expert].t() if group_size else weight_scale[expert]
        given = (q[begin:end], scale[begin:end], packed[expert], each)
        y[begin:end] = linear_packed_per_token.reference(*given, bits=bits, group_size=group_size)
    return y
