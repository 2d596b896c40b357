"""`mq_ao::qcausal_conv1d` against exact integer sums and against the q/dq simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from mq_ao import MqAoError
from mq_ao.ops.causal_conv1d import causal_conv1d
from mq_ao.ops.qcausal_conv1d import qcausal_conv1d

pytestmark = pytest.mark.usefixtures("native_kernels")
op = torch.ops.mq_ao.qcausal_conv1d


def operands(batch: int, length: int, channels: int, taps: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randint(0, 256, (batch, length, channels), dtype=torch.uint8, generator=g),
        "weight": torch.randint(-127, 128, (channels, taps), dtype=torch.int8, generator=g),
        "weight_scale": torch.rand(channels, generator=g) * 0.01 + 1e-3,
        "bias": torch.randn(channels, generator=g),
    }


def as_signed(q: Tensor) -> Tensor:
    """uint8 numbers less 128, as int8."""
    return (q.to(torch.int16) - 128).to(torch.int8)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 3, 7, 33, 65]),
    channels=st.sampled_from([1, 5, 16, 40, 130]),
    taps=st.sampled_from([1, 2, 3, 4, 5, 9]),
    zero_point=st.integers(0, 255),
    signed=st.booleans(),
)
def test_sums_are_the_exact_integers(
    batch: int, length: int, channels: int, taps: int, zero_point: int, signed: bool
) -> None:
    w = operands(batch, length, channels, taps)
    if signed:
        w["x"], zero_point = as_signed(w["x"]), zero_point - 128
    ones = torch.ones(channels)
    y, _ = op(w["x"], 1.0, zero_point, w["weight"], ones)
    padded = torch.nn.functional.pad(w["x"].long() - zero_point, (0, 0, taps - 1, 0))
    exact = sum(padded[:, k : k + length] * w["weight"][:, k].long() for k in range(taps))
    assert torch.equal(y.long(), exact)


@settings(max_examples=40, deadline=None)
@given(
    length=st.sampled_from([1, 2, 5, 40]),
    channels=st.sampled_from([3, 16, 70]),
    taps=st.sampled_from([2, 4, 6]),
    with_bias=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)
def test_agrees_with_the_dequantized_float_convolution(
    length: int, channels: int, taps: int, with_bias: bool, activation: str | None
) -> None:
    w = operands(2, length, channels, taps)
    scale, zero_point = 0.037, 117
    state = (torch.randint(0, 256, (2, taps - 1, channels)) - zero_point) * scale
    bias = w["bias"] if with_bias else None
    y, last = op(w["x"], scale, zero_point, w["weight"], w["weight_scale"], bias, state, activation)
    x = (w["x"].double() - zero_point) * scale
    exact, exact_last = causal_conv1d.reference(
        x,
        w["weight"] * w["weight_scale"][:, None].double(),
        None if bias is None else bias.double(),
        state.double(),
        activation,
    )
    # The sum is exact; scale, bias and SiLU round in float32, a few ulp of the largest term.
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), exact_last, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 33, 65]),
    channels=st.sampled_from([1, 5, 16, 130]),
    taps=st.sampled_from([1, 2, 4, 9]),
    zero_point=st.integers(0, 255),
    activation=st.sampled_from([None, "silu"]),
)
def test_rounded_output(
    batch: int, length: int, channels: int, taps: int, zero_point: int, activation: str | None
) -> None:
    w = operands(batch, length, channels, taps)
    state = torch.randn(batch, taps - 1, channels, generator=torch.Generator().manual_seed(1))
    args = (w["x"], 0.037, 117, w["weight"], w["weight_scale"], w["bias"], state, activation)
    y, last = op(*args)
    q, q_last = op(*args, 0.06, zero_point)
    assert q.dtype == torch.uint8 and torch.equal(q_last, last)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor
    assert torch.equal(q, quantize(y, 0.06, zero_point, 0, 255, torch.uint8))
    # The reference may round scale, bias and SiLU to a neighbouring float, and then to a neighbouring integer.
    assert (q.int() - qcausal_conv1d.reference(*args, 0.06, zero_point)[0].int()).abs().max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 33, 65]),
    channels=st.sampled_from([1, 5, 16, 130]),
    taps=st.sampled_from([1, 2, 4, 9]),
    zero_point=st.integers(0, 255),
    byte_output=st.booleans(),
    with_state=st.booleans(),
)
def test_int8_is_uint8_less_128(
    batch: int, length: int, channels: int, taps: int, zero_point: int, byte_output: bool, with_state: bool
) -> None:
    w = operands(batch, length, channels, taps)
    # Some states lie outside of the grid, and are clamped to it.
    state = torch.randn(batch, taps - 1, channels) * 4 if with_state else None
    rest = (w["weight"], w["weight_scale"], w["bias"], state, "silu", 0.06 if byte_output else None)
    for call in (op, qcausal_conv1d.reference):
        y, last = call(as_signed(w["x"]), 0.037, zero_point - 128, *rest, 90 - 128)
        unsigned, unsigned_last = call(w["x"], 0.037, zero_point, *rest, 90)
        assert torch.equal(y, as_signed(unsigned) if byte_output else unsigned)
        assert y.dtype == (torch.int8 if byte_output else torch.float32) and torch.equal(last, unsigned_last)


def test_a_sequence_in_two_parts_gives_the_same_bits_as_in_one() -> None:
    w = operands(2, 50, 48, 4)
    args = (0.021, 90, w["weight"], w["weight_scale"], w["bias"])
    whole, last = op(w["x"], *args, None, "silu")
    first, state = op(w["x"][:, :17], *args, None, "silu")
    second, end = op(w["x"][:, 17:], *args, state, "silu")
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(end, last)


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    wide = torch.randint(0, 256, (2, 9, 100), dtype=torch.uint8)
    w = operands(2, 9, 40, 4)
    x = wide[..., 30:70]
    args = (0.1, 3, w["weight"], w["weight_scale"], w["bias"])
    for got, expected in zip(op(x, *args), op(x.contiguous(), *args), strict=True):
        assert torch.equal(got, expected)


def test_a_state_with_nan_gives_nan() -> None:
    w = operands(1, 5, 16, 4)
    y, _ = op(w["x"], 0.1, 3, w["weight"], w["weight_scale"], None, torch.full((1, 3, 16), torch.nan))
    assert y[:, :3].isnan().all() and y[:, 3:].isfinite().all()


def test_opcheck() -> None:
    w = operands(2, 6, 20, 4)
    torch.library.opcheck(
        op.default, (w["x"], 0.1, 7, w["weight"], w["weight_scale"], w["bias"], torch.zeros(2, 3, 20), "silu")
    )
    rest = (w["weight"], w["weight_scale"], None, None, "silu", 0.1, 9)
    torch.library.opcheck(op.default, (w["x"], 0.1, 7, *rest))
    torch.library.opcheck(op.default, (as_signed(w["x"]), 0.1, 7, *rest))


def test_results_do_not_depend_on_threads() -> None:
    w = operands(3, 70, 300, 4)
    args = (w["x"], 0.1, 7, w["weight"], w["weight_scale"], w["bias"], None, "silu", 0.05, 9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = op(*args)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(op(*args), alone, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 16)}, "x must be uint8 or int8"),
        ({"weight": torch.zeros(16, 4)}, "weight must be int8"),
        ({"weight_scale": torch.ones(15)}, "weight_scale must be float32 .16,."),
        ({"bias": torch.ones(3)}, "bias|Size|size"),
        ({"x": torch.zeros(1, 0, 16, dtype=torch.uint8)}, "length 0"),
    ],
)
def test_bad_operands_are_named(change: dict[str, Tensor], message: str) -> None:
    w = operands(1, 5, 16, 4) | change
    with pytest.raises((MqAoError, RuntimeError), match=message):
        op(w["x"], 0.1, 7, w["weight"], w["weight_scale"], w["bias"])


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((0.0, 7, None, 0), "x_scale must be positive"),
        ((0.1, 256, None, 0), "x_zero_point must lie in 0..255"),
        ((0.1, 7, 0.0, 0), "out_scale must be positive"),
        ((0.1, 7, 1.0, 256), "out_zero_point must lie in 0..255"),
    ],
)
def test_bad_grids_are_named(grid: tuple[float, int, float | None, int], message: str) -> None:
    w = operands(1, 5, 16, 4)
    scale, zero_point, *out = grid
    with pytest.raises(MqAoError, match=message):
        op(w["x"], scale, zero_point, w["weight"], w["weight_scale"], None, None, None, *out)


@pytest.mark.parametrize(
    ("zero_point", "out_zero_point", "message"),
    [(128, 0, "x_zero_point must lie in -128..127"), (0, -129, "out_zero_point must lie in -128..127")],
)
def test_bad_grids_of_int8_are_named(zero_point: int, out_zero_point: int, message: str) -> None:
    w = operands(1, 5, 16, 4)
    with pytest.raises(MqAoError, match=message):
        op(as_signed(w["x"]), 0.1, zero_point, w["weight"], w["weight_scale"], None, None, None, 0.1, out_zero_point)
