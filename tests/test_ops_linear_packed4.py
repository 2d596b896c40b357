"""4-bit weights and groups of inputs in the integer linear layers: exact integers, defined rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mq_ao.errors import MqAoError
from mq_ao.ops import linear_packed as ql
from mq_ao.ops import packing

pytestmark = pytest.mark.usefixtures("native_kernels")
ops = torch.ops.mq_ao

outputs = st.one_of(st.integers(1, 200), st.sampled_from([16, 32, 48, 64, 80, 96, 128]))
inputs = st.one_of(st.integers(1, 60), st.sampled_from([4, 5, 48, 256, 333, 512]))
# Kernels differ for one tile of rows (6 with AVX-512), for up to four, and for more.
leading = st.sampled_from([(), (0,), (1,), (2,), (3,), (5,), (6,), (7,), (24,), (25,), (100,), (2, 3), (2, 1, 4)])
group_sizes = st.sampled_from([0, 4, 8, 12, 32, 64, 128, 1024])
widths = st.sampled_from([8, 4])
seeds = st.integers(0, 2**31)
drawn = settings(max_examples=80, deadline=None)


class Layer:
    """A random layer with its weight (n, k), packed weight, scales (n,) or (n, groups), and bias."""

    def __init__(self, n: int, k: int, bits: int, group_size: int, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        top = 2 ** (bits - 1)
        self.options = (bits, group_size)
        self.weight = torch.randint(-top, top, (n, k), dtype=torch.int8, generator=gen)
        self.packed = ops.linear_prepack(self.weight, bits, group_size)
        shape = (n, packing.group_count(k, group_size)) if group_size else (n,)
        self.scale = torch.rand(shape, generator=gen) * 0.02 + 1e-4
        self.bias = torch.randn(n, generator=gen)

    def dequantized(self) -> Tensor:
        """The weight as float64."""
        group_size, k = self.options[1], self.weight.shape[1]
        scale = self.scale.repeat_interleave(group_size, 1)[:, :k] if group_size else self.scale[:, None]
        return self.weight.double() * scale.double()


def activations(shape: tuple[int, ...], seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen)


@drawn
@given(outputs, inputs, widths, group_sizes, seeds)
def test_packing_is_the_documented_one_and_comes_back(n: int, k: int, bits: int, group_size: int, seed: int) -> None:
    made = Layer(n, k, bits, group_size, seed)
    assert made.packed.shape == (packing.packed_bytes(n, k, bits, group_size),)
    assert torch.equal(made.packed, packing.linear_prepack.reference(made.weight, bits, group_size))
    assert torch.equal(ops.linear_unpack(made.packed, n, k, bits, group_size), made.weight)
    assert torch.equal(packing.linear_unpack.reference(made.packed, n, k, bits, group_size), made.weight)


def test_four_bits_take_half_the_bytes() -> None:
    # Beside the sums, which are 4 bytes for each output.
    assert packing.packed_bytes(3072, 768, 4) - 3072 * 4 == (packing.packed_bytes(3072, 768) - 3072 * 4) // 2


@drawn
@given(leading, outputs, inputs, st.sampled_from([0, 117, 255]), seeds)
def test_integers_are_exact(lead: tuple[int, ...], n: int, k: int, zero_point: int, seed: int) -> None:
    made = Layer(n, k, 4, 0, seed)
    x = activations((*lead, k), seed)
    y = ops.linear_packed(x, 1.0, zero_point, made.packed, torch.ones(n), bits=4)
    # 512 products below 2^11 each: float32 holds their sums.
    assert torch.equal(y.long(), (x.long() - zero_point) @ made.weight.long().t())


@pytest.mark.parametrize("rows", [1, 100])
def test_extreme_values_do_not_saturate(rows: int) -> None:
    k = 65536
    for value in (-8, 7):
        packed = ops.linear_prepack(torch.full((40, k), value, dtype=torch.int8), 4)
        y = ops.linear_packed(torch.full((rows, k), 255, dtype=torch.uint8), 1.0, 0, packed, torch.ones(40), bits=4)
        # One float32 rounding of an exact sum.
        assert (y == torch.tensor(255 * value * k, dtype=torch.float32)).all()


@drawn
@given(leading, outputs, inputs, widths, group_sizes, st.booleans(), st.booleans(), seeds)
def test_static_follows_its_reference(
    lead: tuple[int, ...], n: int, k: int, bits: int, group_size: int, with_bias: bool, requantized: bool, seed: int
) -> None:
    made = Layer(n, k, bits, group_size, seed)
    x = activations((*lead, k), seed)
    out_scale = 0.7 if requantized else None
    args = (x, 0.0213, 101, made.packed, made.scale, made.bias if with_bias else None, out_scale, 13, *made.options)
    y = ops.linear_packed(*args)
    assert y.dtype == (torch.uint8 if requantized else torch.float32) and y.shape == (*lead, n)
    assert torch.equal(y, ql.linear_packed.reference(*args))


@drawn
@given(leading, outputs, inputs, widths, group_sizes, st.booleans(), st.booleans(), seeds)
def test_per_token_follows_its_reference(
    lead: tuple[int, ...], n: int, k: int, bits: int, group_size: int, with_bias: bool, requantized: bool, seed: int
) -> None:
    made = Layer(n, k, bits, group_size, seed)
    q, scale = ops.quantize_per_token(torch.randn(*lead, k, generator=torch.Generator().manual_seed(seed)))
    out_scale = 0.1 if requantized else None
    args = (q, scale, made.packed, made.scale, made.bias if with_bias else None, out_scale, 130, *made.options)
    y = ops.linear_packed_per_token(*args)
    assert torch.equal(y, ql.linear_packed_per_token.reference(*args))


@drawn
@given(st.integers(1, 30), outputs, inputs, widths, group_sizes, seeds)
def test_groups_are_what_they_say(m: int, n: int, k: int, bits: int, group_size: int, seed: int) -> None:
    made = Layer(n, k, bits, group_size, seed)
    x = activations((m, k), seed)
    y = ops.linear_packed(x, 0.0213, 101, made.packed, made.scale, made.bias, None, 0, *made.options)
    centred = (x.double() - 101) * 0.0213
    exact = centred @ made.dequantized().t() + made.bias.double()
    size = centred.abs() @ made.dequantized().abs().t() + made.bias.abs().double()
    # Each group's product has 3 roundings (see test_ops_linear_packed.test_float_epilogue), its sum one more if
    # it is not exact, and each of the additions one, all at most 2^-24 of what `size` adds up.
    bound = 2**-24 * size * (4 + packing.group_count(k, group_size)) * 1.01
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_may_lie_group_by_group(bits: int) -> None:
    made = Layer(81, 100, bits, 32)
    x = activations((9, 100), 1)
    args = (None, None, 0, *made.options)
    by_group = made.scale.t().contiguous().t()
    assert by_group.stride() != made.scale.stride()
    want = ops.linear_packed(x, 0.02, 3, made.packed, made.scale, *args)
    assert torch.equal(ops.linear_packed(x, 0.02, 3, made.packed, by_group, *args), want)


@pytest.mark.parametrize("k", [48, 50])
def test_strided_activations_and_scales(k: int) -> None:
    made = Layer(80, k, 4, 16)
    wide = activations((2, 9, 2 * k + 7), 4)
    scales = torch.rand(2, 9, 3)[..., 1:2]
    args = (made.packed, made.scale, made.bias, None, 0, *made.options)
    for q in (wide[..., 3 : 3 + k], wide[..., : 2 * k : 2]):
        for rows, scale in ((q, scales), (q.transpose(0, 1), scales.transpose(0, 1)), (q[:, ::2], scales[:, ::2])):
            want = ops.linear_packed_per_token(rows.contiguous(), scale.contiguous(), *args)
            assert torch.equal(ops.linear_packed_per_token(rows, scale, *args), want)


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("rows", [1, 70])
def test_number_of_threads_does_not_change_results(rows: int, group_size: int) -> None:
    made = Layer(1333, 256, 4, group_size)
    x = torch.randn(rows, 256)

    def run() -> Tensor:
        tokens = ops.quantize_per_token(x)
        return ops.linear_packed_per_token(*tokens, made.packed, made.scale, made.bias, None, 0, *made.options)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        assert torch.equal(run(), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("group_size", [0, 4])
def test_opcheck(group_size: int) -> None:
    made = Layer(20, 10, 4, group_size)
    x = activations((2, 3, 10), 8)
    shared = (made.packed, made.scale, made.bias, None, 0, *made.options)
    torch.library.opcheck(ops.linear_prepack.default, (made.weight, *made.options))
    torch.library.opcheck(ops.linear_unpack.default, (made.packed, 20, 10, *made.options))
    torch.library.opcheck(ops.linear_packed.default, (x, 0.02, 3, *shared))
    torch.library.opcheck(ops.linear_packed_per_token.default, (x, torch.rand(2, 3, 1), *shared))


class TwoProducts(torch.nn.Module):
    """One quantization that feeds two products."""

    def __init__(self) -> None:
        super().__init__()
        made = Layer(20, 16, 4, 8)
        self.options = made.options
        self.register_buffer("packed", made.packed)
        self.register_buffer("scale", made.scale.t().contiguous().t())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = ql.quantize_per_token(x)
        shared = (q, scale, self.packed, self.scale)
        y = ql.linear_packed_per_token(*shared, bits=4, group_size=8)
        return y, ql.linear_packed_per_token(*shared, out_scale=0.1, out_zero_point=128, bits=4, group_size=8)


def test_exports_and_compiles() -> None:
    model = TwoProducts()
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(model, (torch.randn(2, 3, 16),), dynamic_shapes=dims)
    x = torch.randn(5, 1, 16)
    want = model(x)
    for run in (program.module(), torch.compile(model)):
        assert all(torch.equal(a, b) for a, b in zip(run(x), want, strict=True))


WEIGHT = torch.zeros(20, 8, dtype=torch.int8)
SCALE, GROUPED = torch.ones(20), torch.ones(20, 2)
X, TOKEN_SCALE = torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3, 1)
PACKED = torch.zeros(packing.packed_bytes(20, 8, 4), dtype=torch.int8)
PACKED_GROUPED = torch.zeros(packing.packed_bytes(20, 8, 4, 4), dtype=torch.int8)
BAD_CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("linear_prepack", "8 or 4 bits, not 5", (WEIGHT, 5)),
    ("linear_prepack", "multiple of 4", (WEIGHT, 4, 6)),
    ("linear_prepack", "multiple of 4", (WEIGHT, 4, -4)),
    ("linear_unpack", "make them with linear_prepack", (PACKED, 20, 8)),
    ("linear_unpack", "make them with linear_prepack", (PACKED, 20, 8, 4, 4)),
    ("linear_unpack", "multiple of 4", (PACKED, 20, 8, 4, 2)),
    ("linear_packed", "make them with linear_prepack", (X, 1.0, 0, PACKED, SCALE)),
    ("linear_packed", "8 or 4 bits, not 2", (X, 1.0, 0, PACKED, SCALE, None, None, 0, 2)),
    ("linear_packed", "make them with linear_prepack", (X, 1.0, 0, PACKED, GROUPED, None, None, 0, 4, 4)),
    ("linear_packed", "weight_scale must be", (X, 1.0, 0, PACKED, GROUPED, None, None, 0, 4)),
    ("linear_packed", r"float32 \(20, 2\)", (X, 1.0, 0, PACKED_GROUPED, SCALE, None, None, 0, 4, 4)),
    ("linear_packed", r"float32 \(20, 2\)", (X, 1.0, 0, PACKED_GROUPED, GROUPED.double(), None, None, 0, 4, 4)),
    ("linear_packed_per_token", "make them with linear_prepack", (X, TOKEN_SCALE, PACKED, SCALE)),
    ("linear_packed_per_token", "multiple of 4", (X, TOKEN_SCALE, PACKED, SCALE, None, None, 0, 4, 5)),
]


@pytest.mark.parametrize(("name", "message", "args"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name: str, message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(MqAoError, match=message):
        getattr(ops, name)(*args)
    with pytest.raises(MqAoError, match=message):
        getattr(ops, f"{name}_reference")(*args)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


@pytest.mark.parametrize("value", [-9, 8])
def test_weights_of_more_than_four_bits_are_refused(value: int) -> None:
    weight = WEIGHT.clone()
    weight[7, 3] = value
    with pytest.raises(MqAoError, match=r"lie in -8\.\.7"):
        ops.linear_prepack(weight, 4)
