"""Channel-first code becomes channel-last nodes, and what a module computes stays the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import linear, silu

from mq_ao import export
from mq_ao.capture.layout import ChannelLast
from tests.captured import operators

MOVING = {"transpose", "permute", "reshape", "view", "contiguous", "matmul", "flatten", "unflatten", "clone"}


class Code(nn.Module):
    """A function of x (batch, length, 6), a weight (8, 6), a weight (3, 4) and a bias (8,)."""

    def __init__(self, code: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code
        generator = torch.Generator().manual_seed(0)
        self.wide, self.narrow, self.bias = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in [(8, 6), (3, 4), 8]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x, self.wide, self.narrow, self.bias)


def captured(module: nn.Module) -> ExportedProgram:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    return export(module, (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))


def flat_and_back(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    flat = x.permute(2, 0, 1).reshape(6, -1)
    y = (w @ flat).reshape(8, -1, x.shape[1]).permute(1, 0, 2)
    y, _ = y.chunk(2, dim=1)
    return (v @ y).transpose(1, 2)


def with_bias(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    y = torch.matmul(w, x.transpose(1, 2)) + b.reshape(8, 1)
    return y.transpose(1, 2)


def rows(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    y = linear(x.transpose(1, 2).contiguous().permute(0, 2, 1).reshape(-1, 6), w, b)
    first, _ = torch.split(y, [4, 4], dim=-1)
    return (v @ first.t()).reshape(3, -1, x.shape[1]).permute(1, 2, 0)


def elementwise(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return silu(x.transpose(1, 2).to(torch.float32)).double().swapaxes(2, 1)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (flat_and_back, {"linear": 2, "chunk": 1}),
        (with_bias, {"linear": 1}),
        (rows, {"linear": 2, "split_with_sizes": 1}),
        (elementwise, {"silu": 1, "to": 2}),
    ],
)
def test_channel_last(code: Callable[..., Tensor], wanted: dict[str, int]) -> None:
    module = Code(code).eval()
    program = captured(module)
    found = operators(program)
    assert not MOVING & set(found) - ({"reshape", "flatten"} if code is with_bias else set())  # Those of the bias.
    assert {name: found[name] for name in wanted} == wanted
    for batch, length in ((1, 1), (3, 4), (1, 7)):
        x = torch.randn(batch, length, 6, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-12, atol=1e-12)


def heads(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Attention: axes are taken apart, and none is merely moved."""
    q = x.view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2)
    scores = q @ q.transpose(-1, -2)
    return (scores @ q).transpose(1, 2).contiguous().view(x.shape[0], x.shape[1], 6)


def view_of_contiguous(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(x.shape[0], 2, 3, x.shape[1])


def written_to(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    flat = (x * 1).permute(2, 0, 1).reshape(6, -1)
    flat += 1
    flat[0] = 2
    return flat.reshape(6, x.shape[0], x.shape[1]).permute(1, 2, 0) * 1


def source_written_to(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    x = x * 1
    flat = x.transpose(0, 1).reshape(-1, 6)
    x.mul_(3)
    return flat.reshape(x.shape[1], x.shape[0], 6).transpose(0, 1) * 1


def weight_is_a_product(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return (v.t() @ v) @ x[..., :4].transpose(1, 2)


def split_of_merged(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """The axis that is divided is batch and channels in one."""
    parts = x.permute(1, 0, 2).reshape(x.shape[1], -1).chunk(2, dim=1)
    return torch.cat(parts, dim=1)


def same_dtype(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return x.transpose(1, 2).to(x.dtype).type_as(x).double().to(dtype=torch.float64).to("cpu") * 1


def keywords(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    y = x.permute(dims=(0, 2, 1)).transpose(dim0=1, dim1=2).contiguous(memory_format=torch.contiguous_format)
    first, second = y.transpose(1, 2).chunk(chunks=2, dim=1)
    z = torch.matmul(w, other=y.transpose(1, 2)).add(other=b[:, None], alpha=2)
    return torch.cat((first, second, z), dim=1).to(torch.float64, copy=True).to(memory_format=torch.preserve_format)


def activated_in_place(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    flat = (x * 1).permute(2, 0, 1).reshape(6, -1)
    silu(flat, True)
    torch.nn.functional.relu(flat, inplace=True)
    return flat.reshape(6, x.shape[0], x.shape[1]).permute(1, 2, 0) * 1


@pytest.mark.parametrize(
    "code",
    [
        keywords,
        activated_in_place,
        heads,
        view_of_contiguous,
        written_to,
        source_written_to,
        weight_is_a_product,
        split_of_merged,
        same_dtype,
    ],
)
def test_values_stay(code: Callable[..., Tensor]) -> None:
    module = Code(code).eval()
    program = captured(module)
    for batch, length in ((2, 5), (4, 3)):
        x = torch.randn(batch, length, 6, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-12, atol=1e-12)


def reorderings() -> st.SearchStrategy[list[tuple[str, int, int]]]:
    step = st.sampled_from(["permute", "merge", "split", "linear", "matmul", "silu", "contiguous", "chunk", "flip"])
    return st.lists(st.tuples(step, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


def apply(x: Tensor, steps: list[tuple[str, int, int]]) -> Tensor:
    """A random walk over the operators that are handled, and one that is not (flip)."""
    merged: list[tuple[int, tuple[int, int]]] = []
    generator = torch.Generator().manual_seed(0)
    for name, i, j in steps:
        dims = x.dim()
        if name == "permute":
            axes = list(range(dims))
            axes[i % dims], axes[j % dims] = axes[j % dims], axes[i % dims]
            x = x.permute(axes)
        elif name == "merge" and dims > 1:
            k = i % (dims - 1)
            shape = (*x.shape[:k], x.shape[k] * x.shape[k + 1], *x.shape[k + 2 :])
            merged.append((x.shape[k] * x.shape[k + 1], (x.shape[k], x.shape[k + 1])))
            x = x.reshape(shape) if j % 2 else x.reshape(*x.shape[:k], -1, *x.shape[k + 2 :])
        elif name == "split" and merged:
            size, parts = merged.pop()
            if size in x.shape:
                k = x.shape.index(size)
                x = x.reshape(*x.shape[:k], *parts, *x.shape[k + 1 :])
        elif name == "linear":
            x = linear(x, torch.randn(x.shape[-1], x.shape[-1], generator=generator, dtype=x.dtype))
        elif name == "matmul" and dims > 1:
            x = torch.randn(x.shape[-2], x.shape[-2], generator=generator, dtype=x.dtype) @ x
        elif name == "silu":
            x = silu(x)
        elif name == "contiguous":
            x = x.contiguous()
        elif name == "chunk":
            x = torch.cat(x.chunk(2, dim=i % dims)[::-1], dim=i % dims)
        elif name == "flip":
            x = x.flip(i % dims)
    return x


@settings(deadline=None, max_examples=200)
@given(reorderings())
def test_any_sequence_of_reorderings(steps: list[tuple[str, int, int]]) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = apply(x, steps)
    with ChannelLast():
        got = apply(x, steps)
    assert got.shape == wanted.shape
    # The largest values grow with every product; sums are taken in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
