"""`mq_ao::selective_scan`: the native kernel and its gradient against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops.selective_scan import selective_scan
from tests.conftest import assert_same_for_any_threads

pytestmark = pytest.mark.usefixtures("native_kernels")
scan = torch.ops.mq_ao.selective_scan
reference = selective_scan.reference


@dataclass(frozen=True)
class Case:
    """A drawn call of the operator."""

    batch: int
    length: int
    groups: int | None
    group_channels: int
    d_state: int
    options: tuple[bool, bool, bool, bool]
    layout: str
    seed: int

    def operands(self, dtype: torch.dtype = torch.float32) -> list[Tensor | bool | None]:
        """Positional arguments, their activations in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        channels = self.group_channels * (self.groups or 1)
        skip, bias, softplus, state = self.options

        def rows(width: int) -> Tensor:
            """(batch, length, width), dense or as a slice of something wider or transposed."""
            if self.layout == "transposed":
                return torch.randn(self.batch, width, self.length, generator=gen).to(dtype).transpose(1, 2)
            extra = 5 if self.layout == "sliced" else 0
            wide = torch.randn(self.batch, self.length, width + extra, generator=gen).to(dtype)
            return wide[..., extra // 2 : extra // 2 + width]

        matrices = [rows((self.groups or 1) * self.d_state) for _ in range(2)]
        if self.groups is not None:
            matrices = [m.unflatten(2, (self.groups, self.d_state)) for m in matrices]
        delta = rows(channels) - 1 if softplus else rows(channels).abs() * 0.3
        return [
            rows(channels),
            delta,
            -torch.rand(channels, self.d_state, generator=gen) * 8,
            *matrices,
            torch.randn(channels, generator=gen) if skip else None,
            torch.randn(channels, generator=gen).abs() * 0.5 if bias else None,
            softplus,
            torch.randn(self.batch, channels, self.d_state, generator=gen) if state else None,
        ]


# Around the vector widths (4, 8, 16), the groups of states (1 to 16) and the chunks (32 steps).
cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 1, 2, 3, 31, 32, 33, 65]),
    groups=st.sampled_from([None, None, 1, 2, 3]),
    group_channels=st.sampled_from([1, 7, 16, 24, 48, 150]),
    d_state=st.sampled_from([1, 5, 8, 16, 16, 32, 64, 128]),
    options=st.tuples(*[st.booleans()] * 4),
    layout=st.sampled_from(["dense", "sliced", "transposed"]),
    seed=st.integers(0, 2**31),
)


def double(operands: list[Tensor | bool | None]) -> list[Tensor | bool | None]:
    return [x.double() if isinstance(x, Tensor) else x for x in operands]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares with an error relative to the largest entry: sums of both signs cancel, so entries have none."""
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-6)
    assert (actual.double() - expected).abs().max().item() <= tolerance * scale


# A float32 sum of up to 128 products rounds at 6e-8 each; states gather such errors over about 1 / (1 - decay) steps.
FLOAT32 = 5e-6
# One rounding of the result to 8 bits.
BFLOAT16 = 2.0**-8


@settings(max_examples=80, deadline=None)
@given(case=cases)
def test_forward_matches_float64(case: Case) -> None:
    operands = case.operands()
    y, state = scan(*operands)
    y_exact, state_exact = reference(*double(operands))
    assert y.dtype == state.dtype == torch.float32
    assert y.is_contiguous() and state.is_contiguous()
    assert_near(y, y_exact, FLOAT32)
    assert_near(state, state_exact, FLOAT32)


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_bfloat16_rounds_only_the_result(case: Case) -> None:
    operands = case.operands(torch.bfloat16)
    y, state = scan(*operands)
    y_exact, state_exact = reference(*double(operands))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near(y, y_exact, BFLOAT16)
    assert_near(state, state_exact, FLOAT32)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_gradients_match_float64_autograd_through_the_reference(case: Case) -> None:
    operands = case.operands()
    exact = double(operands)
    for x in operands + exact:
        if isinstance(x, Tensor):
            x.requires_grad_()
    y, state = scan(*operands)
    y_exact, state_exact = reference(*exact)
    gen = torch.Generator().manual_seed(case.seed + 1)
    dy = torch.randn(y.shape, generator=gen, dtype=torch.float64)
    dstate = torch.randn(state.shape, generator=gen, dtype=torch.float64)
    inputs, inputs_exact = ([x for x in group if isinstance(x, Tensor)] for group in (operands, exact))
    grads = torch.autograd.grad([y, state], inputs, [dy.float(), dstate.float()])
    grads_exact = torch.autograd.grad([y_exact, state_exact], inputs_exact, [dy, dstate])
    for grad, grad_exact in zip(grads, grads_exact, strict=True):
        # Gradients of A and of the biases add up to batch * length * d_state such terms.
        assert_near(grad, grad_exact, 4 * FLOAT32)


def test_reference_gradient_is_the_derivative() -> None:
    operands = Case(2, 3, 2, 2, 3, (True, True, True, True), "dense", 0).operands()
    exact = [x.double().requires_grad_() if isinstance(x, Tensor) else x for x in operands]
    assert torch.autograd.gradcheck(scan, tuple(exact))


def test_gradient_of_one_output_alone() -> None:
    operands = Case(1, 5, None, 16, 16, (True, True, True, True), "dense", 0).operands()
    u = operands[0]
    assert isinstance(u, Tensor)
    u.requires_grad_()
    y, state = scan(*operands)
    assert torch.autograd.grad(y.sum(), u, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(state.sum(), u)[0].abs().sum() > 0


def test_bfloat16_gradients_have_their_operands_dtypes() -> None:
    operands = Case(2, 40, None, 24, 16, (True, True, True, True), "sliced", 0).operands(torch.bfloat16)
    exact = double(operands)
    tensors = [x.requires_grad_() for x in operands if isinstance(x, Tensor)]
    tensors_exact = [x.requires_grad_() for x in exact if isinstance(x, Tensor)]
    grads = torch.autograd.grad(scan(*operands)[0].sum(), tensors)
    grads_exact = torch.autograd.grad(reference(*exact)[0].sum(), tensors_exact)
    for x, grad, grad_exact in zip(tensors, grads, grads_exact, strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, grad_exact, BFLOAT16)


@pytest.mark.parametrize("cut", [1, 31, 50])
def test_parts_carry_the_state(cut: int) -> None:
    operands = Case(2, 70, None, 40, 16, (True, True, True, True), "dense", 3).operands()
    u, delta, A, B, C, D, bias, softplus, start = operands
    y, state = scan(*operands)
    first, carried = scan(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, bias, softplus, start)
    second, last = scan(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, bias, softplus, carried)
    # The same operations in the same order, but for the kernel of length 1.
    torch.testing.assert_close(torch.cat((first, second), dim=1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_threads() -> None:
    assert_same_for_any_threads(scan, Case(3, 70, 2, 150, 16, (True, True, True, True), "dense", 1).operands())


def test_nan_and_infinity_reach_the_output_and_nothing_else() -> None:
    for poison in (math.nan, math.inf):
        operands = Case(2, 40, None, 40, 16, (True, True, True, True), "dense", 1).operands()
        u = operands[0]
        assert isinstance(u, Tensor)
        u[1, 20, 33] = poison
        y, state = scan(*operands)
        assert not y[1, 20:, 33].isfinite().any()
        assert y[:, :20].isfinite().all() and y[0].isfinite().all()
        assert y[1, :, :33].isfinite().all() and y[1, :, 34:].isfinite().all()
        assert not state[1, 33].isfinite().any()


def test_extreme_steps_forget_or_keep_everything() -> None:
    u = torch.ones(1, 2, 16)
    A = -torch.ones(16, 16)
    matrix = torch.ones(1, 2, 16)
    start = torch.full((1, 16, 16), 3.0)
    for step, kept in ((0.0, 3.0), (1e4, None), (1e30, None)):
        delta = torch.full((1, 2, 16), step)
        _, state = scan(u * 0, delta, A, matrix, matrix, None, None, False, start)
        torch.testing.assert_close(state, torch.full_like(state, kept or 0.0), rtol=0, atol=0)


def test_other_dtypes_run_the_reference() -> None:
    operands = Case(1, 4, None, 7, 5, (True, True, True, True), "dense", 0).operands()
    y, state = scan(*double(operands))
    assert y.dtype == state.dtype == torch.float64
    half = [x.half() if isinstance(x, Tensor) and i in (0, 1, 3, 4) else x for i, x in enumerate(operands)]
    y_half, state_half = scan(*half)
    assert y_half.dtype == torch.float16 and state_half.dtype == torch.float32
    torch.testing.assert_close(y_half.double(), y, rtol=1e-2, atol=1e-2)  # float16 keeps 11 bits


BAD = {
    "empty": (0, lambda u: u[:, :0], "length 0"),
    "rank": (0, lambda u: u[0], "u must be"),
    "integer": (0, lambda u: u.int(), "floating point"),
    "delta": (1, lambda x: x[..., 1:], "delta must have shape"),
    "dtype": (1, lambda x: x.bfloat16(), "share a dtype"),
    "A": (2, lambda x: x[1:], "A must have shape"),
    "B": (3, lambda x: x[..., :1], "B must have shape"),
    "C": (4, lambda x: x.unsqueeze(2), "same groups"),
    "D": (5, lambda x: x[1:], "D must have shape"),
    "bias": (6, lambda x: x[None], "delta_bias must have shape"),
    "state": (8, lambda x: x.transpose(1, 2), "initial_state must have shape"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_is_wrong(fault: str) -> None:
    position, spoil, message = BAD[fault]
    operands = Case(2, 4, None, 6, 5, (True, True, True, True), "dense", 0).operands()
    operands[position] = spoil(operands[position])
    if fault == "empty":
        operands[1], operands[3], operands[4] = (operands[i][:, :0] for i in (1, 3, 4))
    with pytest.raises(MqAoError, match=message):
        scan(*operands)


def test_groups_must_divide_the_channels() -> None:
    operands = Case(1, 2, 4, 2, 3, (False,) * 4, "dense", 0).operands()
    operands[3], operands[4] = operands[3][:, :, :3], operands[4][:, :, :3]
    with pytest.raises(MqAoError, match="8 channels cannot be divided into the 3 groups"):
        scan(*operands)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_opcheck(length: int, groups: int | None) -> None:
    operands = Case(2, length, groups, 8, 16, (True, True, True, True), "dense", 0).operands()
    torch.library.opcheck(scan.default, tuple(operands))
    bare = Case(2, length, groups, 8, 16, (False,) * 4, "sliced", 0).operands()
    for x in bare[:5]:
        x.requires_grad_()
    torch.library.opcheck(scan.default, tuple(bare))


class Scan(torch.nn.Module):
    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.mq_ao.selective_scan(u, delta, A, B, C, None, None, True)


def test_exports_with_any_batch_and_length() -> None:
    args = tuple(x for x in Case(3, 6, None, 8, 4, (False, False, True, False), "dense", 0).operands()[:5])
    auto = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    shapes = (auto, auto, None, auto, auto)
    program = torch.export.export(Scan(), args, dynamic_shapes=shapes).module()
    for batch, length in ((1, 1), (2, 40)):
        other = Case(batch, length, None, 8, 4, (False, False, True, False), "dense", 1).operands()[:5]
        for a, b in zip(program(*other), Scan()(*other), strict=True):
            assert torch.equal(a, b)
