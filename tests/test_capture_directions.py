"""Blocks that scan in several directions at once, as of VMamba (Liu et al., NeurIPS 2024), in a user's own module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import passes
from mq_ao.capture import grouped
from mq_ao.capture.layout import ChannelLast
from mq_ao.graph import Role, match
from mq_ao.graph.residual import streams
from mq_ao.lowering import inductor
from mq_ao.passes import Status
from mq_ao.recipes import RECIPES

DIRECTIONS = 4
# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9


class FourScans(nn.Module):
    """Rows and columns of an image, forwards and backwards, in one grouped scan."""

    def __init__(self, width: int, d_state: int = 4, rank: int = 2, *, pointwise: bool = False) -> None:
        super().__init__()
        inner = 2 * width
        self.rank, self.d_state, self.pointwise = rank, d_state, pointwise
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.randn(DIRECTIONS, rank + 2 * d_state, inner) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(DIRECTIONS, inner, rank) * rank**-0.5)
        self.dt_projs_bias = nn.Parameter(torch.randn(DIRECTIONS, inner) - 3)
        self.A_logs = nn.Parameter(torch.rand(DIRECTIONS * inner, d_state))
        self.Ds = nn.Parameter(torch.rand(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, height, width, channels)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = nn.functional.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self.scan(x).transpose(1, 2).unflatten(1, x.shape[2:])
        return self.out_proj(self.out_norm(y) * nn.functional.silu(z))

    def scan(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> (batch, channels, height * width)."""
        inner, height, width = x.shape[1:]
        columns = x.transpose(2, 3)
        both = torch.stack([x.flatten(2), columns.flatten(2)], dim=1)
        xs = torch.cat([both, both.flip(-1)], dim=1)
        if self.pointwise:
            weight = self.x_proj_weight.flatten(0, 1).unsqueeze(-1)
            low = nn.functional.conv1d(xs.flatten(1, 2), weight, groups=DIRECTIONS).unflatten(1, (DIRECTIONS, -1))
        else:
            low = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
        dt, b, c = low.split([self.rank, self.d_state, self.d_state], dim=2)
        delta = torch.einsum("b k r l, k d r -> b k d l", dt, self.dt_projs_weight)
        y, _ = torch.ops.mq_ao.selective_scan(
            xs.flatten(1, 2).transpose(1, 2),
            delta.flatten(1, 2).transpose(1, 2),
            -torch.exp(self.A_logs),
            b.permute(0, 3, 1, 2),
            c.permute(0, 3, 1, 2),
            self.Ds,
            self.dt_projs_bias.flatten(),
            True,
        )
        ys = y.transpose(1, 2).unflatten(1, (DIRECTIONS, inner))
        back = ys[:, 2:].flip(-1)
        upright = [part.unflatten(-1, (width, height)).transpose(2, 3).flatten(2) for part in (ys[:, 1], back[:, 1])]
        return ys[:, 0] + back[:, 0] + upright[0] + upright[1]


class Classifier(nn.Module):
    def __init__(self, *, pointwise: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.mixers = nn.ModuleList(FourScans(16, pointwise=pointwise) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.embed(patches)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            hidden = hidden + mixer(norm(hidden))
        return self.head(self.norm(hidden).mean((1, 2)))


def build(*, pointwise: bool = False) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(pointwise=pointwise).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def patches(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 5, 7, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pointwise", [False, True])
def test_four_directions_in_one_scan_are_one_block(pointwise: bool) -> None:
    model = build(pointwise=pointwise)
    graph = mq_ao.export(model, (patches(2),)).module(check_guards=False)
    torch.testing.assert_close(graph(patches(3)), model(patches(3)), rtol=1e-5, atol=1e-5)
    found = match(graph)
    assert found.rejected == ()
    assert [block.name for block in found.blocks] == ["mixers.0", "mixers.1"]
    roles = [role for role, _ in found.blocks[0].by_role()]
    assert (roles.count(Role.X_PROJ), roles.count(Role.DT_PROJ)) == (DIRECTIONS, DIRECTIONS)
    assert len(found.blocks[0].gates) == len(found.blocks[0].norms) == 1
    (stream,) = streams(graph, found.blocks)
    assert stream.problem is None


def test_rewrites_are_exact_and_say_what_they_leave_out() -> None:
    model = build().double()
    graph = mq_ao.export(model, (patches(2).double(),)).module(check_guards=False)
    rewrite = passes.apply(graph, RECIPES["mambaquant-w8a8"].passes, [(patches(8, 1).double(),)])
    with torch.no_grad():
        got, expected = graph(patches(3).double()), model(patches(3).double())
    assert float((got - expected).norm() / expected.norm()) < EXACT
    applied = {item.name for item in rewrite.transforms if item.status is Status.APPLIED}
    assert {"fold_norm", "smooth_gate", "rotate_residual", "rotate_out_proj"} <= applied
    left_out = {item.name: item.detail for item in rewrite.transforms if item.status is Status.LEFT_OUT}
    assert "groups of channels have a pair of linears each" in left_out["smooth_dt"]
    assert "channels before positions" in left_out["smooth_conv"]


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "mambaquant-w8a8", "mambaquant-static-w4a8"])
def test_quantized_it_runs_in_integers_and_equals_its_simulation(recipe: str) -> None:
    model = build()
    quantized = mq_ao.quantize(model, [(patches(8, 1),)], recipe)
    integer = inductor.rewrite(quantized.converted)
    # Embedding and head; in_proj, out_proj, four x_proj and four dt_proj a block.
    assert sum(count for kernel, count in integer.kernels.items() if "linear" in kernel) == 2 + 2 * 10
    assert integer.simulated == []
    rejected = [item.detail for item in quantized.report().quantization.decisions if not item.accepted]
    assert rejected.count("there is no integer kernel for convolutions over two axes") == 2
    with torch.no_grad():
        got, expected = integer.module(patches(3)), quantized.converted(patches(3))
    # A value on the border between two integers may fall to either side where sums are formed in another order.
    assert float((got - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("b k d l, k c d -> b k c l", (2, 3, 4, 5), (3, 6, 4)),
        ("bkdl,kdc->blkc", (2, 3, 4, 5), (3, 4, 6)),
        ("lbi,boi->lbo", (5, 3, 4), (3, 6, 4)),
    ],
)
def test_an_einsum_over_groups_is_as_many_linears(equation: str, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    values = torch.randn(x, dtype=torch.float64)
    weights = nn.Parameter(torch.randn(weight, dtype=torch.float64), requires_grad=False)
    expected = torch.einsum(equation, values, weights)
    got = grouped.einsum(equation, values, weights)
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("bld,cd->blc", (2, 3, 4), (5, 4)),
        ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
        ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bkdl,kcd->bkl", (2, 3, 4, 5), (3, 6, 4)),
        ("bki,koi", (2, 3, 4), (3, 5, 4)),
    ],
)
def test_other_products_stay_what_they_are(equation: str, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    values, weights = torch.randn(x), torch.randn(weight)
    assert grouped.einsum(equation, values, weights) is None
    with ChannelLast():
        torch.testing.assert_close(torch.einsum(equation, values, weights), torch.einsum(equation, values, weights))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_size_one_is_a_linear_a_group(groups: int, bias: bool) -> None:
    conv = nn.Conv1d(6, 9, 1, groups=groups, bias=bias).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    with torch.no_grad(), ChannelLast():
        got = conv(x)
    with torch.no_grad():
        torch.testing.assert_close(got, conv(x), rtol=1e-12, atol=1e-12)
