"""`mq_ao::linear_packed` and `linear_packed_per_token`: exact integers, defined rounding, every instruction set."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from mq_ao.errors import MqAoError
from mq_ao.ops import linear_packed as ql
from mq_ao.ops import packing
from mq_ao.ops.native import build

pytestmark = pytest.mark.usefixtures("native_kernels")
ops = torch.ops.mq_ao

# Sums of 512 products of 8-bit numbers stay below 2^24, so that float32 holds them exactly.
MOST_EXACT_INPUTS = 512
outputs = st.one_of(st.integers(1, 200), st.sampled_from([16, 48, 64, 80, 128]))
inputs = st.one_of(st.integers(1, 60), st.sampled_from([4, 5, 48, 256, 333, MOST_EXACT_INPUTS]))
leading = st.sampled_from([(), (0,), (1,), (2,), (5,), (6,), (7,), (13,), (100,), (2, 3), (1, 0), (2, 1, 4)])
seeds = st.integers(0, 2**31)
drawn = settings(max_examples=60, deadline=None)


def layer(n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, packed weight, weight scale and bias."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=gen)
    scale = torch.rand(n, generator=gen) * 0.02 + 1e-4
    return weight, ops.linear_prepack(weight), scale, torch.randn(n, generator=gen)


def per_token(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    suffix: str = "",
) -> Tensor:
    """A linear layer that quantizes its own input, token by token; with "_reference" in references."""
    quantize, linear = (getattr(ops, name + suffix) for name in ("quantize_per_token", "linear_packed_per_token"))
    return linear(*quantize(x), packed, scale, bias)


def activations(shape: tuple[int, ...], seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen)


@drawn
@given(outputs, inputs, seeds)
def test_packing_is_the_documented_one_and_comes_back(n: int, k: int, seed: int) -> None:
    weight, packed, _, _ = layer(n, k, seed)
    assert packed.shape == (packing.packed_bytes(n, k),)
    assert torch.equal(packed, packing.linear_prepack.reference(weight))
    assert torch.equal(ops.linear_unpack(packed, n, k), weight)
    assert torch.equal(packing.linear_unpack.reference(packed, n, k), weight)


def test_packing_takes_any_strides() -> None:
    weight = torch.randint(-128, 128, (30, 20), dtype=torch.int8).t()
    assert torch.equal(ops.linear_unpack(ops.linear_prepack(weight), 20, 30), weight)


@drawn
@given(leading, outputs, inputs, st.sampled_from([0, 1, 117, 128, 255]), seeds)
def test_integers_are_exact(lead: tuple[int, ...], n: int, k: int, zero_point: int, seed: int) -> None:
    weight, packed, _, _ = layer(n, k, seed)
    x = activations((*lead, k), seed)
    y = ops.linear_packed(x, 1.0, zero_point, packed, torch.ones(n))
    assert y.dtype == torch.float32
    assert torch.equal(y.long(), (x.long() - zero_point) @ weight.long().t())


def test_extreme_values_do_not_saturate() -> None:
    k = 5120
    for value in (-128, 127):
        packed = ops.linear_prepack(torch.full((80, k), value, dtype=torch.int8))
        y = ops.linear_packed(torch.full((7, k), 255, dtype=torch.uint8), 1.0, 0, packed, torch.ones(80))
        # One float32 rounding of an exact sum.
        assert (y == torch.tensor(255 * value * k, dtype=torch.float32)).all()


@drawn
@given(leading, outputs, inputs, st.booleans(), seeds)
def test_float_epilogue(lead: tuple[int, ...], n: int, k: int, with_bias: bool, seed: int) -> None:
    weight, packed, scale, bias = layer(n, k, seed)
    x = activations((*lead, k), seed)
    args = (x, 0.0213, 101, packed, scale, bias if with_bias else None)
    y = ops.linear_packed(*args)
    assert torch.equal(y, ql.linear_packed.reference(*args))
    product = (x.double() - 101) @ weight.double().t() * (scale.double() * 0.0213)
    exact = product + (bias.double() if with_bias else 0)
    # Three roundings of relative size 2^-24 act on the product (activation scale, product of scales, product;
    # the sum is exact here), one more on the result; the fourth is for what is of second order.
    bound = 2**-24 * (4 * product.abs() + exact.abs()) * 1.01 + 1e-30
    assert ((y.double() - exact).abs() <= bound).all()


@drawn
@given(leading, outputs, inputs, st.floats(1e-3, 10.0), st.integers(0, 255), seeds)
def test_requantized_output(
    lead: tuple[int, ...], n: int, k: int, out_scale: float, zero_point: int, seed: int
) -> None:
    _, packed, scale, bias = layer(n, k, seed)
    x = activations((*lead, k), seed)
    y = ops.linear_packed(x, 0.0213, 101, packed, scale, bias)
    q = ops.linear_packed(x, 0.0213, 101, packed, scale, bias, out_scale, zero_point)
    assert q.dtype == torch.uint8
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor
    assert torch.equal(q, quantize(y, out_scale, zero_point, 0, 255, torch.uint8))
    args = (x, 0.0213, 101, packed, scale, bias, out_scale, zero_point)
    assert torch.equal(q, ql.linear_packed.reference(*args))


def test_requantization_rounds_ties_to_even() -> None:
    packed = ops.linear_prepack(torch.ones(16, 1, dtype=torch.int8))
    x = torch.arange(200, dtype=torch.uint8)[:, None]
    q = ops.linear_packed(x, 0.5, 0, packed, torch.ones(16), None, 1.0, 3)
    assert torch.equal(q[:, 0].float(), torch.round(torch.arange(200) * 0.5) + 3)


@pytest.mark.parametrize("k", [48, 50])
def test_strided_and_expanded_activations(k: int) -> None:
    _, packed, scale, bias = layer(80, k, 3)
    wide = activations((2, 9, 2 * k + 7), 4)
    floats = torch.randn(wide.shape)
    for view in (slice(3, 3 + k), slice(0, 2 * k, 2)):
        x, xf = wide[..., view], floats[..., view]
        for u, f in (
            (x, xf),
            (x[:, ::2], xf[:, ::2]),
            (x.transpose(0, 1), xf.transpose(0, 1)),
            (x[:, :1].expand(2, 9, k), xf[:, :1].expand(2, 9, k)),
        ):
            want = ops.linear_packed(u.contiguous(), 0.02, 9, packed, scale, bias)
            assert torch.equal(ops.linear_packed(u, 0.02, 9, packed, scale, bias), want)
            want = per_token(f.contiguous(), packed, scale, bias)
            assert torch.equal(per_token(f, packed, scale, bias), want)


@drawn
@given(
    leading,
    inputs,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1e-37, 1e-6, 1.0, 1e4, 1e36]),
    seeds,
)
def test_token_quantizer_matches_its_reference(
    lead: tuple[int, ...], k: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    x = (torch.randn(*lead, k, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    q, scale = ops.quantize_per_token(x)
    want, want_scale = ql.quantize_per_token.reference(x)
    assert torch.equal(q, want) and torch.equal(scale, want_scale)
    assert q.dtype == torch.uint8 and q.shape == x.shape and scale.shape == (*lead, 1)
    # Half a step, and the roundings of the reciprocal and of its product with up to 127 steps.
    assert ((q.double() - 128) * scale - x.double()).abs().le(scale.double() * (0.5 + 127 * 2**-22)).all()


def test_token_quantizer_rounds_ties_to_even_and_uses_the_whole_range() -> None:
    x = torch.arange(-127, 127.5, 0.5)[None]  # the scale is exactly 1
    q, scale = ql.quantize_per_token(x)
    assert scale.item() == 1.0
    assert torch.equal(q.float() - ql.TOKEN_ZERO_POINT, torch.round(x))
    assert (q.min(), q.max()) == (1, 255)


@drawn
@given(leading, outputs, inputs, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_dynamic_matches_its_reference(
    lead: tuple[int, ...], n: int, k: int, with_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, packed, scale, bias = layer(n, k, seed)
    x = torch.randn(*lead, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    args = (x, packed, scale, bias if with_bias else None)
    y = per_token(*args)
    assert y.dtype == torch.float32 and y.shape == (*lead, n)
    assert torch.equal(y, per_token(*args, suffix="_reference"))
    q, row_scale = ql.quantize_per_token(x)
    assert torch.equal(y, ops.linear_packed_per_token(q, row_scale, *args[1:]))
    product = ((q.double() - 128) @ weight.double().t()) * (scale.double() * row_scale.double())
    exact = product + (bias.double() if with_bias else 0)
    # Roundings as in test_float_epilogue.
    bound = 2**-24 * (4 * product.abs() + exact.abs()) * 1.01 + 1e-30
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_rows_do_not_touch_their_neighbours(dtype: torch.dtype) -> None:
    _, packed, scale, bias = layer(80, 50, 5)
    clean = torch.randn(9, 50).to(dtype)
    x = clean.clone()
    x[1] = 0
    x[2, 49] = torch.nan
    x[3, 0] = torch.inf
    x[4, 7] = -torch.inf
    x[5] *= 1e-41
    y, want = per_token(x, packed, scale, bias), per_token(clean, packed, scale, bias)
    assert torch.equal(y[1], bias)
    assert y[2:5].isnan().all()
    # A denormal row is far below the smallest scale, which leaves zeros.
    assert torch.equal(y[5], bias)
    rest = [0, 6, 7, 8]
    assert torch.equal(y[rest], want[rest])
    reference = per_token(x, packed, scale, bias, suffix="_reference")
    assert torch.allclose(y, reference, rtol=0, atol=0, equal_nan=True)
    args = (*ops.quantize_per_token(x), packed, scale, bias, 0.1, 77)
    requantized = ops.linear_packed_per_token(*args)
    assert (requantized[2:5] == 0).all()
    assert torch.equal(requantized, ql.linear_packed_per_token.reference(*args))


def test_number_of_threads_does_not_change_results() -> None:
    _, packed, scale, bias = layer(333, 256, 6)
    x = torch.randn(70, 256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = per_token(x, packed, scale, bias)
        torch.set_num_threads(3)
        assert torch.equal(per_token(x, packed, scale, bias), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("k", [8, 10])
def test_opcheck(k: int) -> None:
    weight, packed, scale, bias = layer(20, k, 7)
    x = activations((2, 3, k), 8)
    torch.library.opcheck(ops.linear_prepack.default, (weight,))
    torch.library.opcheck(ops.linear_unpack.default, (packed, 20, k))
    torch.library.opcheck(ops.linear_packed.default, (x, 0.02, 3, packed, scale))
    torch.library.opcheck(ops.linear_packed.default, (x, 0.02, 3, packed, scale, bias, 0.5, 7))
    torch.library.opcheck(ops.quantize_per_token.default, (torch.randn(2, 3, k),))
    torch.library.opcheck(ops.linear_packed_per_token.default, (x, torch.rand(2, 3, 1), packed, scale, bias, 0.5, 7))


def test_exports_with_dynamic_rows() -> None:
    _, packed, scale, bias = layer(20, 8, 9)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return per_token(x, packed, scale, bias)

    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(Layer(), (torch.randn(2, 3, 8),), dynamic_shapes=dims)
    x = torch.randn(5, 1, 8)
    assert torch.equal(program.module()(x), per_token(x, packed, scale, bias))


GOOD_WEIGHT, GOOD_PACKED, GOOD_SCALE, GOOD_BIAS = (
    torch.zeros(20, 8, dtype=torch.int8),
    torch.zeros(packing.packed_bytes(20, 8), dtype=torch.int8),
    torch.ones(20),
    torch.zeros(20),
)
X = torch.zeros(3, 8, dtype=torch.uint8)
XF = torch.zeros(3, 8)
BAD_CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("linear_prepack", "int8 weight", (XF,)),
    ("linear_prepack", "int8 weight", (GOOD_SCALE.to(torch.int8),)),
    ("linear_prepack", "at least 1 output", (GOOD_WEIGHT[:0],)),
    ("linear_prepack", "1 to 65536 inputs", (GOOD_WEIGHT[:, :0],)),
    ("linear_prepack", "1 to 65536 inputs", (torch.zeros(1, 65537, dtype=torch.int8),)),
    ("linear_unpack", "make them with linear_prepack", (GOOD_PACKED, 40, 8)),
    ("linear_unpack", "make them with linear_prepack", (GOOD_PACKED.float(), 20, 8)),
    ("linear_packed", "uint8 activations", (XF, 1.0, 0, GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed", "not a scalar", (X[0, 0], 1.0, 0, GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed", "0..255", (X, 1.0, 256, GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed", "make them with linear_prepack", (X[:, :4], 1.0, 0, GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed", "make them with linear_prepack", (X, 1.0, 0, GOOD_PACKED[1:], GOOD_SCALE)),
    ("linear_packed", "weight_scale must be", (X, 1.0, 0, GOOD_PACKED, GOOD_SCALE.double())),
    ("linear_packed", "bias must be", (X, 1.0, 0, GOOD_PACKED, GOOD_SCALE, GOOD_BIAS[1:])),
    ("linear_packed", "out_scale must be positive", (X, 1.0, 0, GOOD_PACKED, GOOD_SCALE, None, 0.0)),
    ("linear_packed", "0..255", (X, 1.0, 0, GOOD_PACKED, GOOD_SCALE, None, 1.0, -1)),
    ("linear_packed", "value for each output", (X, 1.0, 0, GOOD_PACKED, torch.tensor(1.0))),
    ("quantize_per_token", "float32 or bfloat16", (X,)),
    ("quantize_per_token", "at least 1 input", (XF[0, 0],)),
    ("quantize_per_token", "at least 1 input", (XF[:, :0],)),
    ("linear_packed_per_token", "uint8 activations", (XF, XF[:, :1], GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed_per_token", "not a scalar", (X[0, 0], XF[0, 0], GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed_per_token", "value for each token", (X, XF[:2, :1], GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed_per_token", "value for each token", (X, XF[:, 0], GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed_per_token", "value for each token", (X, XF[:, :1].double(), GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed_per_token", "out_scale must be positive", (X, XF[:, :1], GOOD_PACKED, GOOD_SCALE, None, -1.0)),
    ("quantize_per_token", "float32 or bfloat16", (XF.double(),)),
    ("linear_packed_per_token", "make them with linear_prepack", (X[:, :4], XF[:, :1], GOOD_PACKED, GOOD_SCALE)),
    ("linear_packed_per_token", "bias must be", (X, XF[:, :1], GOOD_PACKED, GOOD_SCALE, GOOD_BIAS[None])),
]


@pytest.mark.parametrize(("name", "message", "args"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name: str, message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(MqAoError, match=message):
        getattr(ops, name)(*args)
    with pytest.raises(MqAoError, match=message):
        getattr(ops, f"{name}_reference")(*args)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))


# The core by itself, so that the variants this machine would not choose are run too.
CORE_SHIM = """
#include "qgemm.h"
using namespace mq_ao::qgemm;
// sizes: rows, outputs, inputs, bits, group size, threads
extern "C" void linear(const long* sizes, const float* x, const int8_t* packed, const float* scale, const float* bias,
                       uint8_t* q, float* row_scale, float* y, uint8_t* requantized, float* weight_only) {
  const long m = sizes[0], threads = sizes[5];
  const Layout l{sizes[1], sizes[2], sizes[3], sizes[4]};
  const Linear w{l, packed, scale, bias};
  for (long i = 0; i < m; ++i) row_scale[i] = quantize_token<8>(x + i * l.k, l.k, q + i * l.depth());
  const Activations bytes{q, l.depth(), row_scale, 1, kTokenZeroPoint};
  const Plan parts = plan(m, l, threads);
  for (long i = 0; i < parts.parts(); ++i) {
    run_part(bytes, w, {y}, m, parts, i);
    run_part(bytes, w, {requantized, true, 1.0f / 0.5f, 100}, m, parts, i);
  }
  for (long i = 0; i < m; ++i) row_scale[i] = quantize_planes(x + i * l.k, l.k, q + 3 * i * l.depth(), l.depth());
  const Activations planes{q, l.depth(), row_scale, 1, 128, 3};
  const Plan wide = plan(m, l, threads, 3);
  for (long i = 0; i < wide.parts(); ++i) run_part(planes, w, {weight_only}, m, wide, i);
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="variants of x86")
@pytest.mark.parametrize("flags", [("-march=x86-64",), ("-march=x86-64-v3",), ("-march=native",)])
def test_every_instruction_set_gives_the_same(flags: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "shim.cpp").write_text(CORE_SHIM)
    shared = tmp_path / "shim.so"
    include = f"-I{Path(build.__file__).parent}"
    command = [build.compiler(), *build.FLAGS, *flags, "-Werror", "-Wall", "-fPIC", "-shared", include]
    subprocess.run([*command, str(tmp_path / "shim.cpp"), "-o", str(shared)], check=True)
    call = ctypes.CDLL(str(shared)).linear
    for m, n, k, threads, group_size in [
        (1, 300, 70, 1, 0),
        (1, 3000, 130, 5, 128),
        (7, 81, 5, 2, 4),
        (64, 200, 401, 7, 0),
        (31, 95, 100, 3, 48),
        (3, 1, 1, 3, 0),
    ]:
        for bits in (8, 4):
            gen = torch.Generator().manual_seed(m)
            top = 2 ** (bits - 1)
            packed = ops.linear_prepack(
                torch.randint(-top, top, (n, k), dtype=torch.int8, generator=gen), bits, group_size
            )
            groups = packing.group_count(k, group_size)
            scale, bias, x = torch.rand(groups, n, generator=gen), torch.randn(n), torch.randn(m, k)
            q = torch.empty(3 * m * ((k + 3) // 4 * 4), dtype=torch.uint8)
            y, requantized, weight_only = torch.empty(m, n), torch.empty(m, n, dtype=torch.uint8), torch.empty(m, n)
            tensors = [x, packed, scale, bias, q, torch.empty(m), y, requantized, weight_only]
            sizes = (ctypes.c_long * 6)(m, n, k, bits, group_size, threads)
            call(sizes, *(ctypes.c_void_p(t.data_ptr()) for t in tensors))
            shared_args = (packed, scale.t() if group_size else scale[0], bias)
            per_token = ql.linear_packed_per_token.reference
            tokens = ql.quantize_per_token.reference(x)
            assert torch.equal(y, per_token(*tokens, *shared_args, bits=bits, group_size=group_size))
            assert torch.equal(requantized, (torch.round(y * 2.0) + 100).clamp(0, 255).to(torch.uint8))
            # Exact sums and the same roundings everywhere; test_ops_linear_packed_weight_only.py has the accuracy.
            assert torch.equal(weight_only, ops.linear_packed_weight_only(x, *shared_args, bits, group_size))
