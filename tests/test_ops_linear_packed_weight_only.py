"""`mq_ao::linear_packed_weight_only`: float activations with packed integer weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mq_ao.errors import MqAoError
from mq_ao.ops import linear_packed_weight_only as wl
from mq_ao.ops import packing

pytestmark = pytest.mark.usefixtures("native_kernels")
ops = torch.ops.mq_ao

outputs = st.one_of(st.integers(1, 200), st.sampled_from([16, 32, 48, 64, 80, 96, 128]))
inputs = st.one_of(st.integers(1, 60), st.sampled_from([4, 5, 48, 256, 333, 512]))
leading = st.sampled_from([(), (0,), (1,), (2,), (3,), (5,), (8,), (9,), (12,), (13,), (100,), (2, 3), (2, 1, 4)])
group_sizes = st.sampled_from([0, 4, 12, 32, 128, 1024])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**31)
drawn = settings(max_examples=100, deadline=None)


def layer(n: int, k: int, bits: int, group_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dequantized weight (float64), packed weight, weight scale and bias."""
    gen = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1)
    weight = torch.randint(-top, top, (n, k), dtype=torch.int8, generator=gen)
    groups = packing.group_count(k, group_size)
    scale = torch.rand((n, groups), generator=gen) * 0.02 + 1e-4
    wide = scale.double().repeat_interleave(group_size or k, 1)[:, :k]
    packed = ops.linear_prepack(weight, bits, group_size)
    bias = torch.randn(n, generator=gen)
    return weight.double() * wide, packed, scale if group_size else scale[:, 0].contiguous(), bias


def assert_accurate(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Checks `y` against float64.

    An activation is off by half a step of max|row| / 8388600, and by 3 roundings of 2^-24 |x|: of the step, of its
    reciprocal, and of the product with that. Of a group's sum, the upper part is rounded when it becomes a float and
    when the lower is added; the lower is below 2^16 steps times the weights, so that its 2 roundings are a 64th of
    the half step. Then come 2 roundings for the scales, one for each group added, and one for the bias.
    """
    values, magnitude = x.double(), weight.abs()
    exact = values @ weight.t()
    half_step = values.abs().amax(-1, keepdim=True).clamp(min=2.0**-103) * (0.5 / 8388600)
    products = (values.abs() + half_step) @ magnitude.t()
    bound = half_step * magnitude.sum(1) + 2**-24 * products * (8 + groups)
    if bias is not None:
        exact, bound = exact + bias.double(), bound + 2**-24 * (exact + bias.double()).abs()
    assert ((y.double() - exact).abs() <= (1 + 2**-6) * 1.001 * bound).all()


@drawn
@given(leading, outputs, inputs, st.sampled_from([8, 4]), group_sizes, st.booleans(), dtypes, seeds)
def test_accuracy(
    lead: tuple[int, ...], n: int, k: int, bits: int, group_size: int, with_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, packed, scale, bias = layer(n, k, bits, group_size, seed)
    x = torch.randn(*lead, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    args = (x, packed, scale, bias if with_bias else None, bits, group_size)
    y = ops.linear_packed_weight_only(*args)
    assert y.dtype == torch.float32 and y.shape == (*lead, n)
    assert_accurate(y, x, weight, args[3], packing.group_count(k, group_size))
    # The reference is a float32 product, whose error may grow with the number of additions; two more roundings are
    # the dequantized weight's and the bias's.
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if with_bias:
        exact, size = exact + bias.double(), size + bias.abs().double()
    assert ((wl.linear_packed_weight_only.reference(*args).double() - exact).abs() <= 2**-24 * (k + 2) * size).all()


@pytest.mark.parametrize(("outlier", "factor"), [(1.0, 1.0), (100.0, 4.0)])
def test_error_beside_that_of_a_float_product(outlier: float, factor: float) -> None:
    weight, packed, scale, _ = layer(300, 768, 8, 0, 1)
    x = torch.randn(50, 768, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= outlier
    exact = x.double() @ weight.t()
    error = (ops.linear_packed_weight_only(x, packed, scale).double() - exact).square().mean().sqrt()
    of_floats = (wl.linear_packed_weight_only.reference(x, packed, scale).double() - exact).square().mean().sqrt()
    # One step for the whole row costs the others something where an outlier sets it: measured 2.7 for a factor of 100.
    assert error <= factor * of_floats


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_size(size: float) -> None:
    weight, packed, scale, _ = layer(70, 90, 8, 0, 2)
    x = torch.randn(7, 90) * size
    assert_accurate(ops.linear_packed_weight_only(x, packed, scale), x, weight, None, 1)


def test_whole_numbers_are_exact() -> None:
    weight = torch.randint(-8, 8, (40, 30), dtype=torch.int8)
    weight[:, 0] = 0
    x = torch.randint(-100, 101, (9, 30)).float()
    x[:, 0] = 8388600.0  # the step is exactly 1
    y = ops.linear_packed_weight_only(x, ops.linear_prepack(weight, 4), torch.ones(40), None, 4)
    assert torch.equal(y.long(), x.long() @ weight.long().t())


def test_special_rows_do_not_touch_their_neighbours() -> None:
    _, packed, scale, bias = layer(80, 50, 8, 0, 5)
    clean = torch.randn(9, 50)
    x = clean.clone()
    x[1] = 0
    x[2, 49] = torch.nan
    x[3, 0] = torch.inf
    x[4, 7] = -torch.inf
    y, want = (
        ops.linear_packed_weight_only(x, packed, scale, bias),
        ops.linear_packed_weight_only(clean, packed, scale, bias),
    )
    assert torch.equal(y[1], bias)
    assert y[2:5].isnan().all()
    assert (
        wl.linear_packed_weight_only.reference(x, packed, scale, bias).isnan().any(1).tolist()
        == y.isnan().any(1).tolist()
    )
    rest = [0, 5, 6, 7, 8]
    assert torch.equal(y[rest], want[rest])


@pytest.mark.parametrize("k", [48, 50])
def test_strided_activations(k: int) -> None:
    _, packed, scale, bias = layer(80, k, 4, 16, 3)
    wide = torch.randn(2, 9, 2 * k + 7)
    args = (packed, scale, bias, 4, 16)
    for x in (wide[..., 3 : 3 + k], wide[..., : 2 * k : 2]):
        for rows in (x, x.transpose(0, 1), x[:, ::2], x[:, :1].expand(2, 9, k)):
            assert torch.equal(
                ops.linear_packed_weight_only(rows, *args), ops.linear_packed_weight_only(rows.contiguous(), *args)
            )


@pytest.mark.parametrize("rows", [1, 70])
def test_number_of_threads_and_rows_does_not_change_results(rows: int) -> None:
    _, packed, scale, bias = layer(1333, 256, 8, 64, 6)
    x = torch.randn(rows, 256)
    args = (packed, scale, bias, 8, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.linear_packed_weight_only(x, *args)
        torch.set_num_threads(3)
        assert torch.equal(ops.linear_packed_weight_only(x, *args), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([ops.linear_packed_weight_only(row[None], *args) for row in x]), alone)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 4)])
def test_opcheck(bits: int, group_size: int) -> None:
    _, packed, scale, bias = layer(20, 10, bits, group_size, 7)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 10).to(dtype)
        torch.library.opcheck(ops.linear_packed_weight_only.default, (x, packed, scale, bias, bits, group_size))


def test_exports_and_compiles() -> None:
    _, packed, scale, bias = layer(20, 8, 4, 4, 9)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wl.linear_packed_weight_only(x, packed, scale, bias, 4, 4)

    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(Layer(), (torch.randn(2, 3, 8),), dynamic_shapes=dims)
    x = torch.randn(5, 1, 8)
    want = ops.linear_packed_weight_only(x, packed, scale, bias, 4, 4)
    assert torch.equal(program.module()(x), want)
    assert torch.equal(torch.compile(Layer())(x), want)


X, SCALE = torch.zeros(3, 8), torch.ones(20)
PACKED = torch.zeros(packing.packed_bytes(20, 8), dtype=torch.int8)
BAD_CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("float32 or bfloat16", (X.double(), PACKED, SCALE)),
    ("not a scalar", (X[0, 0], PACKED, SCALE)),
    ("make them with linear_prepack", (X[:, :4], PACKED, SCALE)),
    ("make them with linear_prepack", (X, PACKED, SCALE, None, 4)),
    ("8 or 4 bits", (X, PACKED, SCALE, None, 16)),
    ("multiple of 4", (X, PACKED, SCALE, None, 8, 3)),
    ("weight_scale must be", (X, PACKED, SCALE[:, None])),
    ("bias must be", (X, PACKED, SCALE, SCALE[1:])),
]


@pytest.mark.parametrize(("message", "args"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(MqAoError, match=message):
        ops.linear_packed_weight_only(*args)
    with pytest.raises(MqAoError, match=message):
        wl.linear_packed_weight_only.reference(*args)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        ops.linear_packed_weight_only(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
