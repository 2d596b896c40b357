"""`mq_ao::causal_conv1d`: the native kernel and its gradient against the float64 reference and torch's conv1d."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops.causal_conv1d import causal_conv1d
from tests.conftest import assert_same_for_any_threads

pytestmark = pytest.mark.usefixtures("native_kernels")
conv = torch.ops.mq_ao.causal_conv1d
reference = causal_conv1d.reference

Operands = list[Tensor | str | None]


@dataclass(frozen=True)
class Case:
    """A drawn call of the operator."""

    batch: int
    length: int
    channels: int
    d_conv: int
    bias: bool
    state: bool
    activation: str | None
    layout: str
    seed: int

    def operands(self, dtype: torch.dtype = torch.float32) -> Operands:
        """Positional arguments, x in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        extra = 5 if self.layout == "sliced" else 0
        x = torch.randn(self.batch, self.length, self.channels + extra, generator=gen).to(dtype)
        x = x[..., extra // 2 : extra // 2 + self.channels]
        if self.layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return [
            x,
            torch.randn(self.channels, self.d_conv, generator=gen),
            torch.randn(self.channels, generator=gen) if self.bias else None,
            torch.randn(self.batch, self.d_conv - 1, self.channels, generator=gen) if self.state else None,
            self.activation,
        ]


# Around the vector widths (4, 8, 16), a task's channels (128), the chunks (32 steps); and shorter than d_conv.
cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 1, 2, 3, 8, 31, 33, 65]),
    channels=st.sampled_from([1, 7, 16, 24, 48, 150, 256]),
    d_conv=st.integers(1, 10),
    bias=st.booleans(),
    state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    layout=st.sampled_from(["dense", "sliced", "transposed"]),
    seed=st.integers(0, 2**31),
)
FULL = Case(2, 40, 24, 4, True, True, "silu", "sliced", 0)

# Ten products and a sigmoid, each rounded at 6e-8 of sums that stay below some tens.
FLOAT32 = 2e-6
# One rounding of the result to 8 bits.
BFLOAT16 = 2.0**-8


def double(operands: Operands) -> Operands:
    return [x.double() if isinstance(x, Tensor) else x for x in operands]


def tensors(operands: Operands) -> list[Tensor]:
    return [x.requires_grad_() for x in operands if isinstance(x, Tensor)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, least: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        scale = max(expected.abs().max().item(), least)
        assert (actual.double() - expected).abs().max().item() <= tolerance * scale


@settings(max_examples=80, deadline=None)
@given(case=cases)
def test_forward_matches_float64(case: Case) -> None:
    operands = case.operands()
    y, state = conv(*operands)
    y_exact, state_exact = reference(*double(operands))
    assert y.dtype == state.dtype == torch.float32
    assert y.is_contiguous() and state.is_contiguous()
    assert_near(y, y_exact, FLOAT32)
    assert torch.equal(state.double(), state_exact)


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_bfloat16_rounds_only_the_result(case: Case) -> None:
    operands = case.operands(torch.bfloat16)
    y, state = conv(*operands)
    y_exact, state_exact = reference(*double(operands))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near(y, y_exact, BFLOAT16)
    assert torch.equal(state.double(), state_exact)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_gradients_match_float64_autograd_through_the_reference(case: Case) -> None:
    operands = case.operands()
    exact = double(operands)
    inputs, inputs_exact = tensors(operands), tensors(exact)
    outputs, outputs_exact = conv(*operands), reference(*exact)
    gen = torch.Generator().manual_seed(case.seed + 1)
    seeds = [torch.randn(y.shape, generator=gen, dtype=torch.float64) for y in outputs]
    grads = torch.autograd.grad(outputs, inputs, [s.float() for s in seeds])
    grads_exact = torch.autograd.grad(outputs_exact, inputs_exact, seeds)
    for grad, grad_exact in zip(grads, grads_exact, strict=True):
        # Gradients of weight and bias add up to batch * length terms of about 1, which may cancel out.
        terms = 1 if grad.shape == inputs[0].shape else (case.batch * case.length) ** 0.5
        assert_near(grad, grad_exact, 4 * FLOAT32, least=terms)


def test_reference_is_torchs_convolution() -> None:
    x, weight, bias, state, _ = double(FULL.operands())
    y, last = reference(x, weight, bias, state, "silu")
    padded = torch.cat((state, x), dim=1).transpose(1, 2)
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=FULL.channels)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected).transpose(1, 2), rtol=1e-12, atol=1e-12)
    assert torch.equal(last, padded.transpose(1, 2)[:, -3:])


def test_reference_gradient_is_the_derivative() -> None:
    operands = Case(2, 3, 2, 4, True, True, "silu", "dense", 0).operands()
    exact = [x.double().requires_grad_() if isinstance(x, Tensor) else x for x in operands]
    assert torch.autograd.gradcheck(conv, tuple(exact))


def test_bfloat16_gradients_have_their_operands_dtypes() -> None:
    operands = FULL.operands(torch.bfloat16)
    exact = double(operands)
    inputs, inputs_exact = tensors(operands), tensors(exact)
    grads = torch.autograd.grad(conv(*operands)[0].sum(), inputs)
    grads_exact = torch.autograd.grad(reference(*exact)[0].sum(), inputs_exact)
    for x, grad, grad_exact in zip(inputs, grads, grads_exact, strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, grad_exact, BFLOAT16)


@pytest.mark.parametrize("cut", [1, 2, 31])
def test_parts_carry_the_state(cut: int) -> None:
    x, weight, bias, state, _ = FULL.operands()
    y, last = conv(x, weight, bias, state, "silu")
    first, carried = conv(x[:, :cut], weight, bias, state, "silu")
    second, end = conv(x[:, cut:], weight, bias, carried, "silu")
    assert torch.equal(torch.cat((first, second), dim=1), y)
    assert torch.equal(end, last)


def test_results_do_not_depend_on_threads() -> None:
    assert_same_for_any_threads(conv, Case(3, 70, 150, 4, True, True, "silu", "dense", 1).operands())


def test_nan_reaches_the_steps_that_read_it() -> None:
    x, weight, bias, state, _ = FULL.operands()
    x[1, 20, 17] = math.nan
    y, _ = conv(x, weight, bias, state, "silu")
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 20:24, 17] = True
    assert torch.equal(y.isnan(), expected)


BAD = {
    "empty": (0, lambda x: x[:, :0], "length 0"),
    "rank": (0, lambda x: x[0], "x must be"),
    "integer": (0, lambda x: x.int(), "floating point"),
    "weight": (1, lambda x: x[1:], "weight must have shape"),
    "weight rank": (1, lambda x: x[:, None], "weight must be"),
    "taps": (1, lambda x: x[:, :0], "no taps"),
    "bias": (2, lambda x: x[1:], "bias must have shape"),
    "state": (3, lambda x: x.transpose(1, 2), "initial_state must have shape"),
    "activation": (4, lambda _: "gelu", "unknown activation 'gelu'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_is_wrong(fault: str) -> None:
    position, spoil, message = BAD[fault]
    operands = FULL.operands()
    operands[position] = spoil(operands[position])
    with pytest.raises(MqAoError, match=message):
        conv(*operands)


@pytest.mark.parametrize("length", [1, 5])
def test_opcheck(length: int) -> None:
    operands = Case(2, length, 8, 4, True, True, "silu", "dense", 0).operands()
    torch.library.opcheck(conv.default, tuple(operands))
    bare = Case(2, length, 8, 3, False, False, None, "sliced", 0).operands()
    torch.library.opcheck(conv.default, (*(x.requires_grad_() for x in bare[:2]), *bare[2:]))


class Conv(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.mq_ao.causal_conv1d(x, weight, None, None, "silu")


def test_exports_with_any_batch_and_length() -> None:
    x, weight, *_ = Case(3, 6, 8, 4, False, False, "silu", "dense", 0).operands()
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    program = torch.export.export(Conv(), (x, weight), dynamic_shapes=(sizes, None)).module()
    for batch, length in ((1, 1), (2, 40)):
        other = torch.randn(batch, length, 8)
        for a, b in zip(program(other, weight), Conv()(other, weight), strict=True):
            assert torch.equal(a, b)
