"""What `torch.compile` gets of a lowered graph: `aten._int_mm` where that takes a linear, and all around it to fuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.compat.compiling import dynamo_settings, inductor_settings
from mq_ao.graph import walk
from mq_ao.ops.gpu_tuning import FEW_OUTPUTS, FEW_ROWS
from mq_ao.ops.int8_linear import MOST_PIECES, finished, scaled

mq = torch.ops.mq_ao

# The CUDA kernel behind `aten._int_mm` asks for sizes that are such multiples.
_MULTIPLE = 8


def product(
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
    """`int8_linear`: in plain operators where `aten._int_mm` takes it, else the operator, which has kernels of its own.

    It is for the tracer of `torch.compile`, which guards the choice by the number of rows.
    """
    if not _taken(q, weight, group_size, weight.shape[0]):
        epilogue = (correction, bias, out_scale, out_zero_point, group_size)
        return mq.int8_linear(q, token_scale, weight, scale, *epilogue)
    rows = q.reshape(-1, q.shape[-1])
    scales = None if token_scale is None else token_scale.reshape(-1, 1)
    y = scaled(torch.ops.aten._int_mm(rows, weight.t()), scales, scale, correction)
    return finished(y, bias, out_scale, out_zero_point).reshape(*q.shape[:-1], weight.shape[0])


def products(
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
    """`int8_linears` likewise: of many rows and outputs a product for each piece, which an epilogue can follow."""
    if weight.shape[0] <= FEW_OUTPUTS or not _taken(q, weight, group_size, *sizes):
        pieces = (sizes, out_scales, out_zero_points, group_size)
        return mq.int8_linears(q, token_scale, weight, scale, correction, bias, *pieces)
    given, start = [], 0
    for size, out_scale, zero_point in zip(sizes, out_scales, out_zero_points, strict=True):
        part = slice(start, start + size)
        less, more = (None if value is None else value[part] for value in (correction, bias))
        given.append(product(q, token_scale, weight[part], scale[part], less, more, out_scale or None, zero_point))
        start += size
    first, second, third = given + [q.new_empty(0, dtype=torch.float32) for _ in range(MOST_PIECES - len(given))]
    return first, second, third


def norm_of_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`int8_rms_norm` with a residual: of many rows, the sum is left to the epilogue of the product before it."""
    if x.numel() // x.shape[-1] <= FEW_ROWS:
        return mq.int8_rms_norm(x, residual, weight, eps, out_scale, out_zero_point)
    total = x + residual
    q, scale, _ = mq.int8_rms_norm(total, None, weight, eps, out_scale, out_zero_point)
    return q, scale, total


def summed(node: Node) -> Node | None:
    """The product that an `int8_rms_norm` adds to a residual, if it is one for `aten._int_mm`; else None."""
    arguments = walk.arguments(node)
    if arguments["residual"] is None:
        return None
    for operand in (arguments["x"], arguments["residual"]):
        if operand.target == mq.int8_linear.default and not walk.arguments(operand)["group_size"]:
            return operand
    return None


def _taken(q: Tensor, weight: Tensor, group_size: int, *sizes: int) -> bool:
    """Whether `aten._int_mm` takes products of these sizes."""
    if group_size or weight.dtype != torch.int8 or any(size % _MULTIPLE for size in (*sizes, q.shape[-1])):
        return False
    return q.numel() // q.shape[-1] > FEW_ROWS


_INLINED: dict[Any, Any] = {mq.int8_linear.default: product, mq.int8_linears.default: products}


def compiled(module: GraphModule, mode: str = "default", dynamic: bool | None = None) -> Callable[..., Any]:
    """Compiles a lowered graph; tensors stay where they are.

    Args:
        module: of an `IntegerGraph` from `lower`; it is not changed.
        mode: of `torch.compile`; "reduce-overhead" replays CUDA graphs, "max-autotune" also tries tiles.
        dynamic: of `torch.compile`.

    Returns:
        A callable with the graph's signature.
    """
    graph = copy.deepcopy(module.graph)
    # On the same weights, with code of its own: dynamo keeps what it compiled by code.
    inlined = GraphModule(module, graph)
    for node in walk.calls(inlined, {mq.int8_rms_norm.default}):
        if summed(node) is not None:
            node.target = norm_of_sum
    for node in walk.calls(inlined, _INLINED):
        node.target = _INLINED[node.target]
    inlined.recompile()
    function = torch.compile(inlined, mode=mode, dynamic=dynamic)

    def run(*args: Any) -> Any:
        # Read where it compiles, which is at a first call. Inductor has a product that it can fuse with only where it
        # may try several.
        tuned = inductor_settings(max_autotune_gemm=args[0].device.type == "cuda")
        # Batch sizes of decode, and lengths on either side of 16 rows, are compiled apart.
        with torch.no_grad(), tuned, dynamo_settings(recompile_limit=64):
            return function(*args)

    return run
