"""`mq_ao::linear_rows`, `linear_rows_weight_only`: the references, and the interpreted kernels against them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.ops import nibbles
from mq_ao.ops.gpu_tuning import FEW_ROWS
from mq_ao.ops.linear_rows import linear_rows

mq = torch.ops.mq_ao
quantize = torch.ops.quantized_decomposed.quantize_per_tensor
pytestmark = pytest.mark.gpu


def _integers(gen: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=gen)


@st.composite
def operands(draw: st.DrawFn) -> dict[str, object]:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    group = draw(st.sampled_from([0, 64, 128]))
    four = group > 0 and draw(st.booleans())
    n = draw(st.sampled_from([1, 5, 48, 80]))
    k = group * draw(st.integers(1, 3)) if group else draw(st.sampled_from([1, 7, 48, 130, 264]))
    leading = draw(st.sampled_from([(1,), (3, 1), (16,), (17,), (2, 33)]))
    weight = _integers(gen, *((-8, 8) if four else (-127, 128)), n, k)
    q = _integers(gen, -128, 128, *leading, 2 * k)[..., ::2]
    shape = (n, k // group) if group else (n,)
    sums = weight.view(*shape, -1).sum(-1, dtype=torch.int32) if group else weight.sum(1, dtype=torch.int32)
    return {
        "q": q,
        "token_scale": torch.rand(*leading, 1, generator=gen) if draw(st.booleans()) else None,
        "weight": nibbles.pack(weight, group) if four else weight,
        "scale": torch.rand(shape, generator=gen) * 1e-3,
        "correction": sums * 5 if draw(st.booleans()) else None,
        "bias": torch.randn(n, generator=gen) if draw(st.booleans()) else None,
        "out_scale": 0.05 if draw(st.booleans()) else None,
        "out_zero_point": 3,
        "group_size": group,
    }


@settings(max_examples=60, deadline=None)
@given(operands())
def test_the_reference_is_the_product_of_dequantized_values(case: dict[str, object]) -> None:
    q, weight, scale, group = case["q"], case["weight"], case["scale"], case["group_size"]
    values = nibbles.unpack(weight, group) if weight.dtype == torch.uint8 else weight
    values = values.double() * (scale.repeat_interleave(group, 1) if group else scale[:, None])
    x = q.double() - (0 if case["correction"] is None else 5)
    expected = x @ values.t() * (1 if case["token_scale"] is None else case["token_scale"].double())
    expected = expected if case["bias"] is None else expected + case["bias"]
    got = linear_rows.reference(**{**case, "out_scale": None})
    # A few roundings of float32 for each of at most 6 groups.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=2e-6 * float(expected.abs().max()))
    if case["out_scale"] is not None:
        rounded = quantize(got, 0.05, 3, -128, 127, torch.int8)
        assert torch.equal(linear_rows.reference(**case), rounded)


@settings(max_examples=60, deadline=None)
@given(operands(), st.integers(0, 2))
def test_the_kernel_rounds_as_the_reference(case: dict[str, object], config: int) -> None:
    from mq_ao.ops.triton import linear_rows as kernel
    from mq_ao.ops.triton.launch import using

    with using(config):
        got = kernel.run(**case)
    expected = linear_rows.reference(**case)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    # Sums are exact, and the epilogue rounds in the same order; on a GPU fewer times, where it fuses additions.
    if not torch.cuda.is_available():
        assert torch.equal(got, expected)
    elif got.dtype == torch.int8:
        assert (got.int() - expected.int()).abs().max() <= 1
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(operands(), st.integers(0, 2), st.booleans())
def test_pieces_are_those_of_the_whole(case: dict[str, object], config: int, three: bool) -> None:
    from mq_ao.ops.triton import linear_rows as kernel
    from mq_ao.ops.triton.launch import using

    n = case["weight"].shape[0]
    sizes = [n] if n == 1 else [2, n - 2] if not three or n < 4 else [1, 2, n - 3]
    grids = [(0.05, 3), (0.0, 0), (0.1, -7)][: len(sizes)]
    scales, zero_points = [scale for scale, _ in grids], [zero_point for _, zero_point in grids]
    shared = [case[name] for name in ("q", "token_scale", "weight", "scale", "correction", "bias")]
    args = (*shared, sizes, scales, zero_points, case["group_size"])
    with using(config):
        both = kernel.run_pieces(*args), mq.linears_rows(*args)
    whole = linear_rows.reference(**{**case, "out_scale": None}).split(sizes, -1)
    for results in both:
        assert all(result.shape == (0,) for result in results[len(sizes) :])
        for got, expected, (scale, zero_point) in zip(results[: len(sizes)], whole, grids, strict=True):
            assert got.shape == expected.shape and got.is_contiguous()
            if not scale:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
                continue
            rounded = quantize(expected, scale, zero_point, -128, 127, torch.int8)
            assert got.dtype == torch.int8 and (got.int() - rounded.int()).abs().max() <= int(torch.cuda.is_available())


@settings(max_examples=40, deadline=None)
@given(operands(), st.integers(0, 2), st.booleans())
def test_float_activations_meet_integer_weights(case: dict[str, object], config: int, narrow: bool) -> None:
    from mq_ao.ops.triton import linear_rows_weight_only as kernel
    from mq_ao.ops.triton.launch import using

    q, weight, scale, group = case["q"], case["weight"], case["scale"], case["group_size"]
    x = q.to(torch.bfloat16 if narrow else torch.float32) / 32
    values = nibbles.unpack(weight, group) if weight.dtype == torch.uint8 else weight
    values = values.double() * (scale.double().repeat_interleave(group, 1) if group else scale[:, None].double())
    expected = torch.nn.functional.linear(x.double(), values, None if case["bias"] is None else case["bias"].double())
    rest = (weight, scale, case["bias"], group)
    with using(config):
        got = kernel.run(x, *rest)
    largest = float((x.double().abs() @ values.abs().t()).max())
    # Of many rows, activations are rounded to bfloat16, by half a unit of its 8 bits.
    bits = 9 if x[..., 0].numel() > FEW_ROWS and not narrow else 20
    for result, off in ((mq.linear_rows_weight_only(x, *rest), 2.0**-20), (got, 2.0**-bits)):
        assert result.dtype == torch.float32 and result.shape == expected.shape
        torch.testing.assert_close(result.double(), expected, rtol=max(off, 1e-5), atol=off * largest)


def test_int4_weights_come_back() -> None:
    weight = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 16)
    packed = nibbles.pack(weight, 64)
    assert packed.shape == (3, 128) and packed.dtype == torch.uint8
    assert torch.equal(nibbles.unpack(packed, 64), weight)


def test_the_operator_has_a_right_shape_function() -> None:
    q, weight = torch.ones(3, 8, dtype=torch.int8), torch.ones(5, 8, dtype=torch.int8)
    torch.library.opcheck(mq.linear_rows.default, (q, torch.ones(3, 1), weight, torch.ones(5)))
    pieces = ([2, 3], [0.1, 0.0], [3, 0])
    torch.library.opcheck(mq.linears_rows.default, (q, torch.ones(3, 1), weight, torch.ones(5), None, None, *pieces))
    torch.library.opcheck(mq.linear_rows_weight_only.default, (torch.ones(3, 8), weight, torch.ones(5)))


def test_bad_operands_are_refused() -> None:
    q, weight, scale = torch.ones(3, 96, dtype=torch.int8), torch.ones(5, 96, dtype=torch.int8), torch.ones(5)
    with pytest.raises(MqAoError, match=r"takes int8 \(..., K\), not torch.float32"):
        mq.linear_rows(q.float(), None, weight, scale)
    with pytest.raises(MqAoError, match="groups of 64 weights do not divide the 96 inputs"):
        mq.linear_rows(q, None, weight, torch.ones(5, 1), group_size=64)
    with pytest.raises(MqAoError, match="the weight has 96 inputs and x has 95"):
        mq.linear_rows(q[:, :95], None, weight, scale)
    with pytest.raises(MqAoError, match="groups of 64 weights do not divide the 96 inputs into even parts"):
        nibbles.pack(weight, 64)
    with pytest.raises(MqAoError, match="int4 weights lie in"):
        nibbles.pack(weight * 9, 32)
    with pytest.raises(MqAoError, match=r"pieces of \[2, 2\] outputs do not make up the 5 of the weight"):
        mq.linears_rows(q, None, weight, scale, None, None, [2, 2], [0.1, 0.1], [0, 0])
    with pytest.raises(MqAoError, match="linears_rows gives 1 to 3 pieces"):
        mq.linears_rows(q, None, weight, scale, None, None, [1, 1, 1, 2], [0.0] * 4, [0] * 4)
    with pytest.raises(MqAoError, match=r"token_scale must be float32 with one value for each token, \(3, 1\)"):
        mq.linear_rows(q, torch.ones(3), weight, scale)
