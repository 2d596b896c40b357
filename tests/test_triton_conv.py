"""Triton kernels of the convolutions, interpreted, against their references and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from mq_ao import MqAoError
from mq_ao.ops.causal_conv1d import causal_conv1d
from mq_ao.ops.qcausal_conv1d import qcausal_conv1d
from mq_ao.ops.triton import causal_conv1d as kernel
from mq_ao.ops.triton.launch import using

pytestmark = pytest.mark.gpu

float_reference, quantized_reference = causal_conv1d.reference, qcausal_conv1d.reference
X_SCALE, OUT_SCALE = 0.037, 0.05


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    batch, length = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 3, 17, 32, 33, 70]))
    channels, taps = draw(st.sampled_from([1, 5, 64, 130])), draw(st.sampled_from([1, 2, 3, 4, 5]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = draw(st.sampled_from(["contiguous", "part", "channels first"]))

    def of_layout(x: Tensor) -> Tensor:
        if layout == "part":
            return torch.cat((x, x), -1)[..., :channels]
        return x if layout == "contiguous" else x.transpose(1, 2).contiguous().transpose(1, 2)

    return {
        "shape": (batch, length, channels),
        "layout": of_layout,
        "gen": gen,
        "taps": taps,
        "bias": torch.randn(channels, generator=gen) if draw(st.booleans()) else None,
        "initial_state": torch.randn(batch, taps - 1, channels, generator=gen) * 3 if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from([None, "silu"])),
    }


def double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


@settings(max_examples=60, deadline=None)
@given(sizes(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 1))
def test_floats_are_next_to_float64(case: dict[str, Any], dtype: torch.dtype, config: int) -> None:
    gen, channels = case["gen"], case["shape"][2]
    x = case["layout"](torch.randn(case["shape"], generator=gen).to(dtype))
    weight = torch.randn(channels, case["taps"], generator=gen)
    options = (case["bias"], case["initial_state"], case["activation"])
    with using(config):
        y, last = kernel.run(x, weight, *options)
    exact, exact_last = float_reference(x.double(), weight.double(), *map(double, options[:2]), options[2])
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous() and last.dtype == torch.float32
    assert torch.equal(last.double(), exact_last)
    # A handful of float32 roundings of the largest term, and one of the dtype.
    size = float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6 * (1 + size))


@settings(max_examples=60, deadline=None)
@given(sizes(), st.booleans(), st.booleans(), st.integers(0, 1))
def test_integers_are_those_of_the_reference(case: dict[str, Any], signed: bool, rounded: bool, config: int) -> None:
    gen, channels = case["gen"], case["shape"][2]
    dtype, zero_point = (torch.int8, -11) if signed else (torch.uint8, 117)
    limits = torch.iinfo(dtype)
    x = case["layout"](torch.randint(limits.min, limits.max + 1, case["shape"], dtype=dtype, generator=gen))
    weight = torch.randint(-127, 128, (channels, case["taps"]), dtype=torch.int8, generator=gen)
    scale = torch.rand(channels, generator=gen) * 0.01 + 1e-3
    inputs = (x, X_SCALE, zero_point, weight, scale, case["bias"], case["initial_state"], case["activation"])
    with using(config):
        y, last = kernel.run_quantized(*inputs, *((OUT_SCALE, 3) if rounded else ()))
    exact, exact_last = quantized_reference(*inputs)
    assert torch.equal(last, exact_last)
    # Sums are exact; scale, bias and SiLU round in float32, a few ulp of the larger term.
    error = 1e-6 * (exact.abs() + 5)
    if not rounded:
        assert y.dtype == torch.float32
        assert ((y - exact).abs() <= error).all()
    else:
        assert y.dtype == dtype
        steps = exact.double() / OUT_SCALE + 3
        near = (steps - steps.floor() - 0.5).abs() <= error / OUT_SCALE
        assert ((y.double() - steps.round().clamp(limits.min, limits.max)).abs() <= near).all()
    assert y.shape == x.shape and y.is_contiguous()


def test_a_state_is_rounded_and_limited_as_the_input_is() -> None:
    x, weight = torch.zeros(1, 1, 4, dtype=torch.int8), torch.ones(4, 3, dtype=torch.int8)
    state = torch.tensor([[[1e9, -1e9, 0.5, torch.nan], [1.5, -2.5, 0.0, 0.0]]])
    got = kernel.run_quantized(x, 1.0, 1, weight, torch.ones(4), None, state)
    for value, wanted in zip(got, quantized_reference(x, 1.0, 1, weight, torch.ones(4), None, state), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_sequence_in_pieces_is_the_sequence() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (2, 41, 20), dtype=torch.int8, generator=gen)
    weight, scale = torch.randint(-127, 128, (20, 4), dtype=torch.int8, generator=gen), torch.ones(20)
    whole, end = kernel.run_quantized(x, X_SCALE, 3, weight, scale)
    state, pieces = None, []
    for piece in x.split([1, 2, 35, 1, 1, 1], 1):
        y, state = kernel.run_quantized(piece, X_SCALE, 3, weight, scale, None, state)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(state, end)


def test_what_the_kernel_does_not_take_goes_to_the_reference() -> None:
    gen = torch.Generator().manual_seed(0)
    for dtype, taps in ((torch.float64, 4), (torch.float32, 9)):
        x, weight = (torch.randn(shape, dtype=dtype, generator=gen) for shape in ((2, 5, 6), (6, taps)))
        for got, wanted in zip(kernel.run(x, weight), float_reference(x, weight), strict=True):
            assert torch.equal(got, wanted)


def test_bad_operands_are_refused() -> None:
    x, weight, scale = torch.zeros(2, 5, 6, dtype=torch.int8), torch.ones(6, 4, dtype=torch.int8), torch.ones(6)
    with pytest.raises(MqAoError, match=r"initial_state must have shape \(2, 3, 6\)"):
        kernel.run_quantized(x, 1.0, 0, weight, scale, None, torch.zeros(2, 2, 6))
    with pytest.raises(MqAoError, match="it has 2 dimensions"):
        kernel.run_quantized(x[0], 1.0, 0, weight, scale)
    with pytest.raises(MqAoError, match="x must be floating point"):
        kernel.run(x, weight.float())
    with pytest.raises(MqAoError, match="unknown activation 'gelu'"):
        kernel.run(x.float(), weight.float(), activation="gelu")
