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
from mq_ao.ops.grids import Grid
from mq_ao.ops.int8_rms_norm import int8_rms_norm
from mq_ao.ops.linear_rows import MOST_PIECES, finished, linear_rows, linears_rows, scaled
from mq_ao.ops.operator import Operands, implements, like

mq = torch.ops.mq_ao

# The CUDA kernel behind `aten._int_mm` asks for sizes that are such multiples.
_MULTIPLE = 8


@implements(linear_rows)
def product(a: Operands) -> Tensor:
    """`linear_rows`: in plain operators where `aten._int_mm` takes it, else the operator, which has kernels of its own.

    It is for the tracer of `torch.compile`, which guards the choice by the number of rows.
    """
    n = a.weight.shape[0]
    if not _taken(a, n):
        epilogue = (a.correction, a.bias, a.out_scale, a.out_zero_point, a.group_size)
        return linear_rows(a.q, a.token_scale, a.weight, a.scale, *epilogue)
    rows = a.q.reshape(-1, a.q.shape[-1])
    scales = None if a.token_scale is None else a.token_scale.reshape(-1, 1)
    y = scaled(torch.ops.aten._int_mm(rows, a.weight.t()), scales, a.scale, a.correction)
    return finished(y, a.bias, Grid.of(a, "out")).reshape(*a.q.shape[:-1], n)


@implements(linears_rows)
def products(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """`linears_rows` likewise: of many rows and outputs a product for each piece, which an epilogue can follow."""
    if a.weight.shape[0] <= FEW_OUTPUTS or not _taken(a, *a.sizes):
        pieces = (a.sizes, a.out_scales, a.out_zero_points, a.group_size)
        return linears_rows(a.q, a.token_scale, a.weight, a.scale, a.correction, a.bias, *pieces)
    given, start = [], 0
    for size, out_scale, zero_point in zip(a.sizes, a.out_scales, a.out_zero_points, strict=True):
        part = slice(start, start + size)
        less, more = (None if value is None else value[part] for value in (a.correction, a.bias))
        epilogue = (less, more, out_scale or None, zero_point)
        given.append(product(a.q, a.token_scale, a.weight[part], a.scale[part], *epilogue))
        start += size
    first, second, third = given + [like(a.q, (0,), torch.float32) for _ in range(MOST_PIECES - len(given))]
    return first, second, third


@implements(int8_rms_norm)
def norm_of_sum(a: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """`int8_rms_norm` with a residual: of many rows, the sum is left to the epilogue of the product before it."""
    rest = (a.weight, a.eps, a.out_scale, a.out_zero_point)
    if a.x.numel() // a.x.shape[-1] <= FEW_ROWS:
        return int8_rms_norm(a.x, a.residual, *rest)
    total = a.x + a.residual
    q, scale, _ = int8_rms_norm(total, None, *rest)
    return q, scale, total


def summed(node: Node) -> Node | None:
    """The product that an `int8_rms_norm` adds to a residual, if it is one for `aten._int_mm`; else None."""
    arguments = walk.arguments(node)
    if arguments["residual"] is None:
        return None
    for operand in (arguments["x"], arguments["residual"]):
        if operand.target == mq.linear_rows.default and not walk.arguments(operand)["group_size"]:
            return operand
    return None


def _taken(a: Operands, *sizes: int) -> bool:
    """Whether `aten._int_mm` takes products of these sizes."""
    k = a.q.shape[-1]
    if a.group_size or a.weight.dtype != torch.int8 or any(size % _MULTIPLE for size in (*sizes, k)):
        return False
    return bool(a.q.numel() // k > FEW_ROWS)


_INLINED: dict[Any, Any] = {mq.linear_rows.default: product, mq.linears_rows.default: products}


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
