"""`mq_ao::qselective_scan`: 8-bit operands against the float64 reference, and its roundings exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from mq_ao.errors import MqAoError
from mq_ao.ops.qselective_scan import qselective_scan
from mq_ao.ops.selective_scan import selective_scan
from mq_ao.ops.state import quantize_state
from tests.conftest import assert_same_bits_for_any_threads
from tests.test_ops_scan import FLOAT32, Case, assert_near, cases

pytestmark = pytest.mark.usefixtures("native_kernels")
scan = torch.ops.mq_ao.qselective_scan
reference = qselective_scan.reference
float_scan = selective_scan.reference
quantize = torch.ops.quantized_decomposed.quantize_per_tensor

NAMES = ("u", "delta", "B", "C")


def to_grid(x: Tensor) -> tuple[Tensor, float, int]:
    """x rounded to uint8 over its range, with scale and zero point."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 1e-3)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    return quantize(x, scale, zero_point, 0, 255, torch.uint8), scale, zero_point


def as_signed(q: Tensor) -> Tensor:
    """uint8 numbers less 128, as int8."""
    return (q.to(torch.int16) - 128).to(torch.int8)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x as `Case` would have drawn it: dense, a slice of wider rows, or transposed."""
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        return torch.nn.functional.pad(x.flatten(2), (2, 3), value=100)[..., 2:-3].reshape(x.shape)
    return x


@dataclass(frozen=True)
class QCase:
    """A drawn call: the floats of `case`, those of NAMES that `integer` tells on their grids, of uint8 or int8."""

    case: Case
    integer: tuple[bool, bool, bool, bool]
    int8_state: bool
    byte_output: bool
    signed: tuple[bool, bool, bool, bool] = (False,) * 4

    @property
    def signed_output(self) -> bool:
        """Whether an 8-bit output is int8: as u is."""
        return self.integer[0] and self.signed[0]

    def arguments(self) -> dict[str, Any]:
        u, delta, A, B, C, D, bias, softplus, state = self.case.operands()
        arguments: dict[str, Any] = {"A": A, "D": D, "delta_bias": bias, "delta_softplus": softplus}
        for name, x, integer, signed in zip(NAMES, (u, delta, B, C), self.integer, self.signed, strict=True):
            q, scale, zero_point = to_grid(x)
            if signed:
                q, zero_point = as_signed(q), zero_point - 128
            arguments |= {
                name: laid_out(q, self.case.layout) if integer else x,
                f"{name}_scale": scale,
                f"{name}_zero_point": zero_point,
            }
        arguments["initial_state"] = state
        if self.int8_state:
            # Small enough that some states are clipped.
            step = torch.rand(A.shape, generator=torch.Generator().manual_seed(self.case.seed)) * 0.02 + 0.01
            arguments["state_scale"] = step
            arguments["initial_state"] = None if state is None else quantize_state(state, step)
        if self.byte_output:
            arguments |= {"out_scale": 0.05, "out_zero_point": 117 - 128 * self.signed_output}
        return arguments


four = st.tuples(*[st.booleans()] * 4)
qcases = st.builds(QCase, case=cases, integer=four, int8_state=st.booleans(), byte_output=st.booleans(), signed=four)
WHOLE = QCase(Case(2, 70, None, 40, 16, (True,) * 4, "dense", 3), (True,) * 4, False, False)
SHORT = QCase(Case(2, 5, 2, 8, 16, (True,) * 4, "sliced", 3), (True,) * 4, True, True)


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and last state in float64 of the operands' values, which are float32 numbers."""
    values = {name: arguments[name] for name in NAMES}
    for name, q in values.items():
        if q.dtype != torch.float32:
            values[name] = (q.float() - arguments[f"{name}_zero_point"]) * arguments[f"{name}_scale"]
    start = arguments["initial_state"]
    if start is not None and "state_scale" in arguments:
        start = start * arguments["state_scale"]
    parameters = [None if x is None else x.double() for x in (arguments["D"], arguments["delta_bias"])]
    u, delta, B, C = (x.double() for x in values.values())
    state = None if start is None else start.double()
    return float_scan(u, delta, arguments["A"].double(), B, C, *parameters, arguments["delta_softplus"], state)


def assert_rounded(q: Tensor, steps: Tensor, low: int, high: int, error: Tensor, most: float = 0.5) -> None:
    """Checks that q is `steps` clamped and moved by `most` at most, where `steps` may be off by `error` before that."""
    assert ((q.double() - steps.clamp(low, high)).abs() <= most + error).all()


@settings(max_examples=80, deadline=None)
@given(qcase=qcases)
def test_matches_float64_and_the_reference(qcase: QCase) -> None:
    arguments = qcase.arguments()
    y, state = scan(**arguments)
    y_exact, state_exact = exact(arguments)
    y_reference, state_reference = reference(**arguments)
    assert y.is_contiguous() and state.is_contiguous()
    assert (y.dtype, state.dtype) == (y_reference.dtype, state_reference.dtype)
    y_error = FLOAT32 * y_exact.abs().max()
    if qcase.byte_output:
        scale, zero_point = arguments["out_scale"], arguments["out_zero_point"]
        limits = torch.iinfo(y.dtype)
        assert_rounded(y, y_exact / scale + zero_point, limits.min, limits.max, y_error / scale)
        assert (y.int() - y_reference.int()).abs().max() <= 1
    else:
        assert_near(y, y_exact, FLOAT32)
        # Both err.
        assert_near(y, y_reference.double(), 2 * FLOAT32)
    if qcase.int8_state:
        step = arguments["state_scale"].double()
        # Up or down, by the bits of the state itself.
        assert_rounded(state, state_exact / step, -127, 127, FLOAT32 * state_exact.abs().max() / step, most=1.0)
        assert (state.int() - state_reference.int()).abs().max() <= 1
    else:
        assert_near(state, state_exact, FLOAT32)
        assert_near(state, state_reference.double(), 2 * FLOAT32)


@settings(max_examples=40, deadline=None)
@given(qcase=qcases)
def test_output_and_state_are_the_roundings_of_the_float_ones(qcase: QCase) -> None:
    limits = torch.iinfo(torch.int8 if qcase.signed_output else torch.uint8)
    zero_point = limits.min + 90
    arguments = qcase.arguments() | {"out_scale": 0.03, "out_zero_point": zero_point}
    y, state = scan(**arguments)
    step = arguments.pop("state_scale", None)
    floats = arguments | {"out_scale": None}
    if step is not None and floats["initial_state"] is not None:
        floats["initial_state"] = floats["initial_state"] * step
    y_float, state_float = scan(**floats)
    assert torch.equal(y, quantize(y_float, 0.03, zero_point, limits.min, limits.max, y.dtype))
    assert torch.equal(state, state_float if step is None else quantize_state(state_float, step))


@settings(max_examples=40, deadline=None)
@given(qcase=qcases)
def test_int8_is_uint8_less_128(qcase: QCase) -> None:
    signed, unsigned = (replace(qcase, signed=(flag,) * 4) for flag in (True, False))
    for call in (scan, reference):
        (y, state), (y_unsigned, state_unsigned) = (call(**case.arguments()) for case in (signed, unsigned))
        if qcase.byte_output and signed.signed_output:
            assert y.dtype == torch.int8
            y_unsigned = as_signed(y_unsigned)
        assert torch.equal(y, y_unsigned) and torch.equal(state, state_unsigned)


@pytest.mark.parametrize("cut", [1, 31, 50, 69])
@pytest.mark.parametrize("byte_output", [False, True])
def test_parts_carry_the_float_state(cut: int, byte_output: bool) -> None:
    arguments = QCase(WHOLE.case, WHOLE.integer, False, byte_output).arguments()
    y, last = scan(**arguments)
    first, carried = scan(**arguments | {n: arguments[n][:, :cut] for n in NAMES})
    second, end = scan(**arguments | {n: arguments[n][:, cut:] for n in NAMES} | {"initial_state": carried})
    parts = torch.cat((first, second), dim=1)
    if cut in (1, 69):
        # The kernel of length 1 adds up states in another order.
        difference = (parts.int() - y.int()).abs().max() if byte_output else (parts - y).abs().max()
        assert difference <= (1 if byte_output else FLOAT32 * y.abs().max())
        torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(parts, y) and torch.equal(end, last)


@pytest.mark.parametrize("cut", [1, 31, 69])
def test_rounding_of_the_carried_state_explains_the_difference_of_parts(cut: int) -> None:
    arguments = WHOLE.arguments()
    # No state is clipped: rounding then moves it by at most a step.
    start, middle = arguments["initial_state"], scan(**arguments | {n: arguments[n][:, :cut] for n in NAMES})[1]
    step = torch.cat((start, middle)).abs().amax(0) / 100 + 1e-3
    arguments |= {"state_scale": step, "initial_state": quantize_state(start, step)}
    y, _ = exact(arguments)
    first, carried = scan(**arguments | {n: arguments[n][:, :cut] for n in NAMES})
    rest = {n: arguments[n][:, cut:] for n in NAMES}
    second, _ = scan(**arguments | rest | {"initial_state": carried})
    assert_near(first, y[:, :cut], FLOAT32)
    # What is left of a step after each further step: the scan of no input from there, all its signs made equal.
    delta, C = ((rest[n].double() - arguments[f"{n}_zero_point"]) * arguments[f"{n}_scale"] for n in ("delta", "C"))
    whole = step.double().expand(carried.shape)
    bias, A = arguments["delta_bias"].double(), arguments["A"].double()
    bound, _ = float_scan(0 * delta, delta, A, 0 * C, C.abs(), None, bias, True, whole)
    difference = (second.double() - y[:, cut:]).abs()
    assert (difference <= bound + FLOAT32 * y.abs().max()).all()
    # The bound is not idle: the rounding is seen.
    assert difference.max() > 10 * FLOAT32 * y.abs().max()


@pytest.mark.parametrize("length", [1, 5])
def test_steps_of_size_zero_keep_every_int8_state(length: int) -> None:
    states = torch.arange(-127, 128, dtype=torch.int8).repeat(2, 16).reshape(2, 255, 16)
    u, delta = torch.ones(2, length, 255), torch.zeros(2, length, 255)
    matrix = torch.ones(2, length, 16)
    step = torch.rand(255, 16, generator=torch.Generator().manual_seed(0)) + 1e-3
    grid = (1.0, 0)
    A = -torch.ones(255, 16)
    args = (u, *grid, delta, *grid, A, matrix, *grid, matrix, *grid, None, None, False, states, step)
    assert torch.equal(scan(*args)[1], states)
    assert torch.equal(reference(*args)[1], states)


def test_roundings_are_half_to_even_and_clamped() -> None:
    # dt = 1, no decay to speak of: state and output are u.
    u = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -127.5, 300.0, -300.0, 1e30, math.inf, -math.inf])
    n = len(u)
    one = torch.ones(1, 1, 1)
    grid = (1.0, 0)
    args = (u.view(1, 1, n), *grid, one.expand(1, 1, n), *grid, -torch.ones(n, 1), one, *grid, one, *grid)
    for call in (scan, reference):
        y, state = call(*args, state_scale=torch.ones(n, 1), out_scale=1.0, out_zero_point=100)
        assert state.flatten().tolist() == [0, 2, 2, 0, -2, 126, 127, -127, 127, -127, 127, 127, -127]
        assert y.flatten().tolist() == [100, 102, 102, 100, 98, 226, 228, 0, 255, 0, 255, 255, 0]


@pytest.mark.parametrize("length", [1, 40])
def test_nan_reaches_float_results_and_is_zero_in_integer_ones(length: int) -> None:
    # As u is float, the output is uint8.
    arguments = QCase(Case(1, length, None, 40, 16, (True,) * 4, "dense", 1), (False, *[True] * 3), True, True)
    poisoned = arguments.arguments()
    poisoned["u"] = poisoned["u"].clone()
    poisoned["u"][0, 0, 33] = math.nan
    for call in (scan, reference):
        y, state = call(**poisoned)
        assert (y[0, :, 33] == 0).all() and (state[0, 33] == 0).all()
    floats = {k: v for k, v in poisoned.items() if k not in ("initial_state", "state_scale", "out_scale")}
    y, state = scan(**floats)
    assert y[0, :, 33].isnan().all() and state[0, 33].isnan().all()
    assert y[0, :, :33].isfinite().all() and y[0, :, 34:].isfinite().all()


@pytest.mark.parametrize("length", [1, 70])
def test_results_do_not_depend_on_threads(length: int) -> None:
    arguments = QCase(Case(3, length, 2, 150, 16, (True,) * 4, "dense", 1), (True,) * 4, True, False).arguments()
    assert_same_bits_for_any_threads(lambda: scan(**arguments))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(length: int, quantized: bool) -> None:
    case = Case(2, length, 2, 8, 16, (True,) * 4, "sliced", 0)
    signed = (quantized, False, quantized, False)
    torch.library.opcheck(scan.default, (), QCase(case, (quantized,) * 4, quantized, quantized, signed).arguments())


class Scan(torch.nn.Module):
    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, step: Tensor) -> Any:
        grid = (0.02, 120)
        return torch.ops.mq_ao.qselective_scan(
            u, *grid, delta, *grid, A, B, *grid, C, *grid, None, None, True, state, step, 0.05, 100
        )


def module_operands(batch: int, length: int) -> tuple[Tensor, ...]:
    arguments = QCase(Case(batch, length, None, 8, 4, (False, False, True, True), "dense", 1), (True,) * 4, True, True)
    values = arguments.arguments()
    return tuple(values[n] for n in ("u", "delta", "A", "B", "C", "initial_state", "state_scale"))


def test_exports_with_any_batch_and_length() -> None:
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    rows = {0: batch, 1: length}
    shapes = (rows, rows, None, rows, rows, {0: batch}, None)
    program = torch.export.export(Scan(), module_operands(3, 6), dynamic_shapes=shapes).module()
    for sizes in ((1, 1), (2, 40)):
        for a, b in zip(program(*module_operands(*sizes)), Scan()(*module_operands(*sizes)), strict=True):
            assert torch.equal(a, b)


def test_compiles() -> None:
    operands = module_operands(2, 6)
    compiled = torch.compile(Scan(), fullgraph=True)
    for a, b in zip(compiled(*operands), Scan()(*operands), strict=True):
        assert torch.equal(a, b)


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "dtype": ({"u": Tensor.double}, "u must be uint8, int8 or float32"),
    "wide": ({"B": lambda x: x.to(torch.int16)}, "B must be uint8, int8 or float32"),
    "scale": ({"delta_scale": lambda _: 0.0}, "delta_scale must be positive"),
    "zero point": ({"C_zero_point": lambda _: 256}, "C_zero_point must lie in 0..255"),
    "signed zero point": ({"B": as_signed, "B_zero_point": lambda _: 128}, "B_zero_point must lie in -128..127"),
    "unsigned zero point": ({"B_zero_point": lambda _: -1}, "B_zero_point must lie in 0..255"),
    "signed output": (
        {"u": as_signed, "u_zero_point": lambda _: 0, "out_zero_point": lambda _: 128},
        "out_zero_point must lie in -128..127",
    ),
    "out_scale": ({"out_scale": lambda _: -1.0}, "out_scale must be positive"),
    "out_zero_point": ({"out_zero_point": lambda _: -1}, "out_zero_point must lie in 0..255"),
    "length": ({n: lambda x: x[:, :0] for n in NAMES}, "length 0"),
    "delta": ({"delta": lambda x: x[..., 1:]}, "delta must have shape"),
    "A": ({"A": lambda x: x[1:]}, "A must have shape"),
    "groups": ({"C": lambda x: x[:, :, 0]}, "same groups"),
    "D": ({"D": lambda x: x[1:]}, "D must have shape"),
    "state": ({"initial_state": lambda x: x[:, 1:]}, "initial_state must have shape"),
    "float state": ({"initial_state": Tensor.float}, "initial_state must be int8 with state_scale"),
    "int8 state": ({"state_scale": lambda _: None}, "initial_state must be int8 with state_scale"),
    "state_scale": ({"state_scale": lambda x: x[1:]}, "state_scale must have A's shape"),
    "scale's dtype": ({"state_scale": Tensor.double}, "state_scale must be float32"),
    "scale's rank": ({"state_scale": lambda x: x[0]}, "state_scale must be float32 .channels, d_state."),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_is_wrong(fault: str) -> None:
    spoilers, message = BAD[fault]
    arguments = SHORT.arguments()
    for name, spoil in spoilers.items():
        arguments[name] = spoil(arguments[name])
    for call in (scan, reference):
        with pytest.raises(MqAoError, match=message):
            call(**arguments)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        scan(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})
