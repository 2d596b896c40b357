"""The Triton kernels of `mq_ao::selective_scan` and `mq_ao::qselective_scan`, interpreted, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.ops import gpu_tuning
from mq_ao.ops.grids import Grid, dequantize
from mq_ao.ops.qselective_scan import qselective_scan
from mq_ao.ops.selective_scan import selective_scan
from mq_ao.ops.state import quantize_state

kernels = pytest.importorskip("mq_ao.ops.triton.selective_scan", reason="needs Triton")
from mq_ao.ops.triton.launch import using  # noqa: E402

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """A drawn call of the operator; `chunk` steps are scanned at once at least."""

    batch: int
    length: int
    groups: int | None
    channels: int
    d_state: int
    options: tuple[bool, bool, bool, bool]
    sliced: bool
    chunk: int
    seed: int

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """By name, activations in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        skip, bias, softplus, state = self.options
        groups = self.groups or 1
        channels = self.channels * groups

        def rows(*width: int) -> Tensor:
            x = torch.randn(self.batch, self.length, *width[:-1], width[-1] + 3, generator=gen).to(dtype)
            x = x[..., 1:-2]
            return x if self.sliced else x.contiguous()

        matrix = (self.d_state,) if self.groups is None else (groups, self.d_state)
        return {
            "u": rows(channels),
            "delta": rows(channels) - 1 if softplus else rows(channels).abs() * 0.3,
            "A": -torch.rand(channels, self.d_state, generator=gen) * 8,
            "B": rows(*matrix),
            "C": rows(*matrix),
            "D": torch.randn(channels, generator=gen) if skip else None,
            "delta_bias": torch.randn(channels, generator=gen).abs() * 0.5 if bias else None,
            "delta_softplus": softplus,
            "initial_state": torch.randn(self.batch, channels, self.d_state, generator=gen) if state else None,
        }


# Interpretation takes a millisecond for each step of a program, which has from one channel on.
cases = st.builds(
    Case,
    batch=st.sampled_from([1, 1, 3]),
    length=st.sampled_from([1, 1, 2, 7, 13]),
    groups=st.sampled_from([None, None, 1, 2]),
    channels=st.sampled_from([1, 5, 9]),
    d_state=st.sampled_from([1, 5, 8, 16, 64, 128]),
    options=st.tuples(*[st.booleans()] * 4),
    sliced=st.booleans(),
    chunk=st.sampled_from([2, 3, 64]),
    seed=st.integers(0, 2**20),
)


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


@pytest.fixture(scope="module", autouse=True)
def _chunks() -> Iterator[None]:
    """Chunks are as short as a case says, however few the threads are."""
    before = gpu_tuning.SHORTEST_CHUNK
    yield
    gpu_tuning.SHORTEST_CHUNK = before


def run(kernel: Callable[..., tuple[Tensor, Tensor]], case: Case, config: int, arguments: dict[str, Any]) -> Any:
    gpu_tuning.SHORTEST_CHUNK = case.chunk
    with using(config):
        return kernel(**arguments)


def tolerances(scan: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, Any]) -> list[float]:
    """1e-5 of the largest sum of magnitudes that make one output, and one state: whatever cancels in them."""
    names = ("u", "x", "B", "C", "D", "initial_state")
    terms = {name: x.abs() if name in names and x is not None else x for name, x in double(arguments).items()}
    return [1e-5 * float(result.abs().max()) for result in scan(**terms)]


def assert_near(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(cases, st.integers(0, 1))
def test_float32_is_near_float64(case: Case, config: int) -> None:
    arguments = case.arguments()
    y, state = run(kernels.run, case, config, arguments)
    exact, exact_state = selective_scan.reference(**double(arguments))
    near, near_state = tolerances(selective_scan.reference, arguments)
    assert y.dtype == state.dtype == torch.float32
    # Decays of up to 13 steps multiply, each with an error of a few roundings and of its exponent.
    assert_near(y, exact, near)
    assert_near(state, exact_state, near_state)


@settings(max_examples=12, deadline=None)
@given(cases)
def test_bfloat16_is_rounded_at_the_end_alone(case: Case) -> None:
    arguments = case.arguments(torch.bfloat16)
    y, state = run(kernels.run, case, 0, arguments)
    exact, exact_state = selective_scan.reference(**double(arguments))
    near, near_state = tolerances(selective_scan.reference, arguments)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near(y, exact, 2**-8 * float(exact.abs().max()) + near)
    assert_near(state, exact_state, near_state)


@dataclass(frozen=True)
class QCase:
    """A drawn call: which operands are of 8 bits and of which kind, states and output too."""

    case: Case
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    int8_state: bool
    byte_output: bool

    def arguments(self) -> dict[str, Any]:
        arguments = self.case.arguments()
        for name, dtype in zip(("u", "delta", "B", "C"), self.dtypes, strict=True):
            x = arguments[name]
            low = 0 if dtype == torch.uint8 else -128
            scale, zero_point = float(x.abs().max()) / 100 + 1e-3, low + 130
            if dtype != torch.float32:
                q = (x / scale).round() + zero_point
                arguments[name] = q.clamp(low, low + 255).to(dtype)
            arguments |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point}
        if self.int8_state:
            arguments["state_scale"] = torch.rand_like(arguments["A"]) * 0.01 + 0.01
            if arguments["initial_state"] is not None:
                arguments["initial_state"] = (arguments["initial_state"] * 40).clamp(-127, 127).to(torch.int8)
        if self.byte_output:
            arguments |= {"out_scale": 0.05, "out_zero_point": 117 if self.dtypes[0] != torch.int8 else -11}
        return arguments


dtypes = st.sampled_from([torch.int8, torch.int8, torch.uint8, torch.float32])
qcases = st.builds(
    QCase, case=cases, dtypes=st.tuples(*[dtypes] * 4), int8_state=st.booleans(), byte_output=st.booleans()
)


def float_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The float32 values of operands."""
    values = {name: x for name, x in arguments.items() if not name.endswith(("_scale", "_zero_point"))}
    for name in ("u", "delta", "B", "C"):
        grid = Grid(arguments[f"{name}_scale"], arguments[f"{name}_zero_point"])
        values[name] = dequantize(arguments[name], grid)
    if values["initial_state"] is not None and "state_scale" in arguments:
        values["initial_state"] = values["initial_state"] * arguments["state_scale"]
    return values


def assert_rounded(q: Tensor, steps: Tensor, low: int, high: int, near: float, most: float = 0.5) -> None:
    """q is `most` from float64 steps, but for values on the border, which roundings before it move."""
    assert q.is_contiguous() and q.shape == steps.shape
    assert float((q.double() - steps.clamp(low, high)).abs().max()) <= most + near


@settings(max_examples=20, deadline=None)
@given(qcases, st.integers(0, 1))
def test_quantized_is_near_float64_and_rounded(qcase: QCase, config: int) -> None:
    arguments = qcase.arguments()
    y, state = run(kernels.run_quantized, qcase.case, config, arguments)
    values = float_arguments(arguments)
    exact, exact_state = selective_scan.reference(**double(values))
    near, near_state = tolerances(selective_scan.reference, values)
    reference = qselective_scan.reference(**arguments)
    assert [x.dtype for x in (y, state)] == [x.dtype for x in reference]
    if qcase.byte_output:
        info = torch.iinfo(y.dtype)
        assert_rounded(y, exact / 0.05 + arguments["out_zero_point"], info.min, info.max, near / 0.05)
    else:
        assert_near(y, exact, near)
    if qcase.int8_state:
        # Up or down, by the bits of the state itself.
        assert_rounded(state, exact_state / arguments["state_scale"], -127, 127, near_state / 0.01, most=1.0)
    else:
        assert_near(state, exact_state, near_state)


def test_states_are_rounded_as_by_the_operator() -> None:
    """Without decay and with step sizes of 1 a state is the product of u and B, to the last bit."""
    gen = torch.Generator().manual_seed(0)
    u, B = torch.randn(2, 1, 40, generator=gen), torch.randn(2, 1, 16, generator=gen)
    scale = torch.rand(40, 16, generator=gen) * 0.1 + 0.01
    operands = {"u": u, "delta": torch.ones_like(u), "B": B, "C": B}
    grids = {f"{name}_{what}": value for name in operands for what, value in (("scale", 1.0), ("zero_point", 0))}
    _, state = kernels.run_quantized(**operands, **grids, A=torch.zeros(40, 16), state_scale=scale)
    expected = quantize_state.reference(u.transpose(1, 2) * B, scale)
    assert torch.equal(state, expected) and len(expected.unique()) > 100


PLAIN = Case(1, 9, None, 5, 16, (True,) * 4, False, 64, 0)


@pytest.mark.parametrize("length", [1, 9])
def test_small_step_sizes_keep_their_precision(length: int) -> None:
    arguments = replace(PLAIN, length=length, options=(False, False, True, False)).arguments()
    arguments["delta"] = arguments["delta"] - 12
    y, _ = kernels.run(**arguments)
    exact, _ = selective_scan.reference(**double(arguments))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("length", [1, 9])
def test_results_that_are_not_numbers_are_rounded_as_by_the_reference(length: int) -> None:
    qcase = QCase(replace(PLAIN, length=length), (torch.float32,) * 4, True, True)
    arguments = qcase.arguments()
    arguments["u"][:, :, 2] = float("nan")
    y, state = kernels.run_quantized(**arguments)
    expected, expected_state = qselective_scan.reference(**arguments)
    assert torch.equal(y[..., 2], expected[..., 2])
    assert torch.equal(state[:, 2], expected_state[:, 2])


def test_float64_goes_to_the_reference() -> None:
    arguments = double(PLAIN.arguments())
    for got, expected in zip(kernels.run(**arguments), selective_scan.reference(**arguments), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected)


def test_bad_operands_are_refused() -> None:
    arguments = PLAIN.arguments()
    with pytest.raises(MqAoError, match="u must be"):
        kernels.run(**{**arguments, "u": arguments["u"][0]})
    quantized = QCase(PLAIN, (torch.int8,) * 4, True, True).arguments()
    with pytest.raises(MqAoError, match="u_scale must be positive"):
        kernels.run_quantized(**{**quantized, "u_scale": 0.0})
    with pytest.raises(MqAoError, match="A must be"):
        kernels.run_quantized(**{**quantized, "A": quantized["A"][:, 0]})
