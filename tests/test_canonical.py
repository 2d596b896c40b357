"""Spellings that are nearly known: whatever becomes of them, values stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mq_ao
from tests.captured import operators


class Function(nn.Module):
    """A function of an input (2, 5, 4) and two parameters, next to a scan-free graph."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator).double() for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def in_place_of_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    part = y[:, :2]
    part.mul_(3)
    return y + 1


def read_after_writing(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    z = y.transpose(1, 2)
    y.add_(1)
    return z + y.transpose(1, 2)


def two_writes(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.add_(1)
    y.mul_(w)
    return y.sigmoid_()


def read_twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = functional.linear(x, a)
    return y * (y + b)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], dict[str, int]]] = {
    "softplus that is sharper": (lambda x, w: functional.softplus(x * w, beta=2), ((4,),), {"softplus": 1}),
    "written to through a view": (in_place_of_a_view, ((4,),), {"mul_": 1}),
    "read after it was written to": (read_after_writing, ((4,),), {"add_": 1}),
    "written to twice": (two_writes, ((4,),), {"add": 1, "mul": 2, "sigmoid": 1}),
    "input written to": (lambda x, w: x.clone().mul_(w), ((4,),), {"mul": 1}),
    "product of weights": (lambda x, a, b: x @ (a @ b), ((4, 3), (3, 5)), {"linear": 1}),
    "sum of two linears": (
        lambda x, a, b: functional.linear(x, a) + functional.linear(x, b),
        ((6, 4), (6, 4)),
        {"linear": 1},
    ),
    "adapters of a shared layer": (
        lambda x, w, a, b: (
            (functional.linear(x, w) + functional.linear(functional.linear(x, a), b)) * functional.linear(x * 2, w)
        ),
        ((6, 4), (2, 4), (6, 2)),
        {"linear": 4},
    ),
    "sum of linears of two inputs": (
        lambda x, a, b: functional.linear(x, a) + functional.linear(x * 2, b),
        ((6, 4), (6, 4)),
        {"linear": 2},
    ),
    "a linear read twice": (
        read_twice,
        ((6, 4), (6,)),
        {"linear": 1, "add": 1},
    ),
    "mean over another axis": (
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * w,
        ((4,),),
        {"rsqrt": 1},
    ),
    "norm of something else": (
        lambda x, w: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5) * w,
        ((4,),),
        {"rsqrt": 1},
    ),
    "strided convolution": (
        lambda x, w: functional.conv1d(x.transpose(1, 2), w, stride=2, padding=2, groups=4),
        ((4, 1, 3),),
        {"conv1d": 1},
    ),
    "convolution, dilated": (
        lambda x, w: functional.conv1d(x.transpose(1, 2), w, dilation=2, padding=2, groups=4),
        ((4, 1, 3),),
        {"conv1d": 1},
    ),
    "even symmetric convolution": (
        lambda x, w: functional.conv1d(x.transpose(1, 2), w, padding="same", groups=4),
        ((4, 1, 4),),
        {"causal_conv1d": 1},
    ),
    "convolution with a short padding": (
        lambda x, w: functional.conv1d(x.transpose(1, 2), w, padding=1, groups=4),
        ((4, 1, 4),),
        {"causal_conv1d": 1, "slice": 1, "pad": 1},
    ),
    "convolution of a circle": (
        lambda x, w: functional.conv1d(functional.pad(x.transpose(1, 2), (2, 0), "circular"), w, groups=4),
        ((4, 1, 3),),
        {"causal_conv1d": 1, "slice": 1},
    ),
    "tail of a convolution": (
        lambda x, w: functional.conv1d(x.transpose(1, 2), w, padding=2, groups=4)[..., 2:],
        ((4, 1, 3),),
        {"causal_conv1d": 1, "pad": 1},
    ),
    "einsum that sums": (lambda x, w: torch.einsum("bld,ed->be", x, w), ((6, 4),), {"einsum": 1}),
    "einsum of an outer product": (lambda x, w: torch.einsum("bld,ef->blef", x, w), ((6, 4),), {"einsum": 1}),
    "broadcast against a view": (
        lambda x, w: (x.transpose(1, 2) * w[:, None] + x[:, :1].transpose(1, 2)).transpose(1, 2),
        ((4,),),
        {"mul": 1, "add": 1},
    ),
    "a view given more axes": (lambda x, w: x.transpose(1, 2) * w, ((3, 2, 4, 1),), {"mul": 1}),
    "activated convolution as the result": (
        lambda x, w: functional.silu(functional.conv1d(x.mT, w, padding=2, groups=4).mT[:, : x.shape[1]]),
        ((4, 1, 3),),
        {"causal_conv1d": 1, "silu": 0, "pad": 0, "slice": 0},
    ),
    "in place as the result": (lambda x, w: (x * w).mul_(2).sigmoid_(), ((4,),), {"sigmoid": 1}),
    "views side by side": (
        lambda x, w: torch.cat([x.transpose(1, 2), (x * w).transpose(1, 2), x.mT], dim=1),
        ((4,),),
        {"cat": 1},
    ),
    "views one after the other": (
        lambda x, w: torch.cat([x.transpose(1, 2), (x * w).transpose(1, 2)], dim=-1),
        ((4,),),
        {"cat": 1},
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_stay_where_a_spelling_is_nearly_known(name: str) -> None:
    function, shapes, wanted = FUNCTIONS[name]
    model = Function(function, *shapes).eval()
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    program = mq_ao.export(model, (x,))
    program.validate()
    found = operators(program)
    assert {key: found[key] for key in wanted} == wanted
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)
