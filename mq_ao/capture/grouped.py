"""Linears that source libraries write as other products: of several groups with weights each, or as an einsum.

VMamba's four directions have one tensor of x_proj weights, (directions, out, in), and one of dt_proj; it multiplies by
them with an einsum, or with a convolution of kernel size 1. Written out as linears, each can be quantized and matched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear


def einsum(equation: str, x: Tensor, weight: Tensor) -> Tensor | None:
    """`torch.einsum` of a batched product such as "b k d l, k c d -> b k c l" as a linear a group.

    Args:
        equation: as torch.einsum takes it.
        x: first operand.
        weight: second operand, a parameter of three axes: one that both operands and the result have (the group), one
            that only the result has besides (out), and one that only x has besides (in).

    Returns:
        The product, or None for any other equation.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    # A product of activations may look the same: it has no groups, but sequences.
    if not arrow or len(names) != 2 or not isinstance(weight, Parameter) or weight.dim() != 3 or "." in equation:
        return None
    left, right = names
    group, inner, outer = (
        [name for name in right if (name in left, name in out) == kind]
        for kind in ((True, True), (True, False), (False, True))
    )
    rest = [name for name in out if name in left and name not in group]
    if not len(group) == len(inner) == len(outer) == 1 or {*left} != {*rest, *group, *inner}:
        return None
    ordered = weight.permute([right.index(name) for name in (*group, *outer, *inner)])
    lines = x.permute([left.index(name) for name in (*group, *rest, *inner)])
    products = [linear(lines[index], ordered[index]) for index in range(weight.shape[right.index(group[0])])]
    axes = [*group, *rest, *outer]
    return torch.stack(products).permute([axes.index(name) for name in out])


@dataclass(frozen=True)
class Product:
    """An einsum that is one linear between two reorderings.

    Attributes:
        x: the operand that is not the weight.
        weight: parameter of two axes.
        transposed: whether it is (in, out), and not (out, in).
        before: order of x's axes that the linear reads.
        after: order of its result's axes.
    """

    x: Tensor
    weight: Tensor
    transposed: bool
    before: tuple[int, ...]
    after: tuple[int, ...]


def plain(equation: str, first: Tensor, second: Tensor) -> Product | None:
    """`torch.einsum` of a product with a parameter, such as "bld,ed->ble" or "ed,...d->...e"; None for any other."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    operands = dict(zip(names, (first, second), strict=False))
    weights = [name for name, value in operands.items() if isinstance(value, Parameter) and value.dim() == 2]
    if not arrow or len(operands) != 2 or len(weights) != 1 or len(set(weights[0])) != 2 or "." in weights[0]:
        return None
    (pair,) = weights
    (left,) = operands.keys() - {pair}
    x = operands[left]
    if "..." in left:
        # Letters for what the dots stand for, in their order.
        spelled = "".join(chr(0x100 + axis) for axis in range(x.dim() - len(left) + 3))
        left, out = left.replace("...", spelled), out.replace("...", spelled)
    inner = [name for name in pair if name in left and name not in out]
    outer = [name for name in pair if name in out and name not in left]
    if len(inner) != 1 or len(outer) != 1 or len(set(left)) != len(left):
        return None
    rest = [name for name in left if name != inner[0]]
    if sorted(out) != sorted([*rest, *outer]):
        return None
    axes = [*rest, *outer]
    before = tuple(map(left.index, [*rest, *inner]))
    return Product(x, operands[pair], pair[0] == inner[0], before, tuple(map(axes.index, out)))


def pointwise_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, options: Any) -> Tensor | None:
    """`torch.nn.functional.conv1d` of kernel size 1 as a linear a group; None for any other, depthwise ones too.

    Args:
        x: (batch, groups * in, length).
        weight: (groups * out, in, 1).
        bias: (groups * out,) or None.
        groups: number of groups.
        options: stride, padding and dilation where they are not the defaults.
    """
    depthwise = groups > 1 and weight.shape[1] == 1
    if weight.shape[-1] != 1 or options or x.dim() != 3 or depthwise:
        return None
    parts = zip(
        x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).unbind(),
        weight.squeeze(-1).unflatten(0, (groups, -1)).unbind(),
        [None] * groups if bias is None else bias.unflatten(0, (groups, -1)).unbind(),
        strict=True,
    )
    return torch.cat([linear(*part) for part in parts], dim=-1).transpose(1, 2)
