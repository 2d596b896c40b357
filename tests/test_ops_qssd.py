"""`mq_ao::qssd_scan`: 8-bit operands against the float64 reference, and its rounding exactly."""

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
from mq_ao.ops.qssd_scan import qssd_scan
from mq_ao.ops.ssd_scan import ssd_scan
from tests.conftest import assert_same_bits_for_any_threads
from tests.test_ops_qscan import as_signed, assert_rounded, four, laid_out, quantize, to_grid
from tests.test_ops_scan import FLOAT32, assert_near
from tests.test_ops_ssd import ROWS, WHOLE, Case, cases, double

pytestmark = pytest.mark.usefixtures("native_kernels")
scan = torch.ops.mq_ao.qssd_scan
reference = qssd_scan.reference
float_scan = ssd_scan.reference


@dataclass(frozen=True)
class QCase:
    """A drawn call: the floats of `case`, those of ROWS that `integer` tells on their grids, of uint8 or int8."""

    case: Case
    integer: tuple[bool, bool, bool, bool] = (True,) * 4
    signed: tuple[bool, bool, bool, bool] = (False,) * 4
    byte_output: bool = False

    @property
    def signed_output(self) -> bool:
        """Whether an 8-bit output is int8: as x is."""
        return self.integer[0] and self.signed[0]

    def arguments(self) -> dict[str, Any]:
        arguments = self.case.arguments()
        for name, integer, signed in zip(ROWS, self.integer, self.signed, strict=True):
            q, scale, zero_point = to_grid(arguments[name])
            if signed:
                q, zero_point = as_signed(q), zero_point - 128
            arguments |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point}
            if integer:
                arguments[name] = laid_out(q, self.case.layout)
        if self.byte_output:
            arguments |= {"out_scale": 0.05, "out_zero_point": 117 - 128 * self.signed_output}
        return arguments


qcases = st.builds(QCase, case=cases, integer=four, signed=four, byte_output=st.booleans())


def values(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ssd_scan` with the operands' values, which are float32 numbers."""
    floats = {name: x for name, x in arguments.items() if not name.endswith(("_scale", "_zero_point"))}
    for name in ROWS:
        if arguments[name].dtype != torch.float32:
            floats[name] = (arguments[name].float() - arguments[f"{name}_zero_point"]) * arguments[f"{name}_scale"]
    return floats


@settings(max_examples=100, deadline=None)
@given(qcase=qcases)
def test_matches_float64_and_the_reference(qcase: QCase) -> None:
    arguments = qcase.arguments()
    y, state = scan(**arguments)
    y_exact, state_exact = float_scan(**double(values(arguments)))
    y_reference, state_reference = reference(**arguments)
    assert y.is_contiguous() and state.is_contiguous()
    assert y.dtype == y_reference.dtype and state.dtype == state_reference.dtype == torch.float32
    if qcase.byte_output:
        scale, limits = arguments["out_scale"], torch.iinfo(y.dtype)
        error = FLOAT32 * y_exact.abs().max() / scale
        assert_rounded(y, y_exact / scale + arguments["out_zero_point"], limits.min, limits.max, error)
        assert (y.int() - y_reference.int()).abs().max() <= 1
    else:
        assert_near(y, y_exact, FLOAT32)
    assert_near(state, state_exact, FLOAT32)


@settings(max_examples=40, deadline=None)
@given(qcase=qcases)
def test_output_is_the_rounding_of_the_float_one(qcase: QCase) -> None:
    limits = torch.iinfo(torch.int8 if qcase.signed_output else torch.uint8)
    arguments = qcase.arguments() | {"out_scale": 0.03, "out_zero_point": limits.min + 90}
    y, state = scan(**arguments)
    y_float, state_float = scan(**arguments | {"out_scale": None})
    assert torch.equal(y, quantize(y_float, 0.03, limits.min + 90, limits.min, limits.max, y.dtype))
    assert torch.equal(state, state_float)


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


@pytest.mark.parametrize("length", [1, 5, 100])
def test_float_operands_are_those_of_ssd_scan(length: int) -> None:
    qcase = QCase(replace(WHOLE, length=length), (False,) * 4)
    floats = torch.ops.mq_ao.ssd_scan(**qcase.case.arguments())
    for actual, expected in zip(scan(**qcase.arguments()), floats, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("length", [3, 100])
def test_nan_is_the_smallest_integer(length: int) -> None:
    arguments = QCase(replace(WHOLE, length=length), (False, True, True, True), byte_output=True).arguments()
    arguments["x"][0, 0, 2, 13] = math.nan
    for call in (scan, reference):
        y, state = call(**arguments)
        assert (y[0, :, 2, 13] == 0).all() and state[0, 2, 13].isnan().all()


@pytest.mark.parametrize("length", [3, 100])
def test_results_do_not_depend_on_threads(length: int) -> None:
    arguments = QCase(replace(WHOLE, length=length, headdim=100), byte_output=True).arguments()
    assert_same_bits_for_any_threads(lambda: scan(**arguments))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(length: int, quantized: bool) -> None:
    case = replace(WHOLE, length=length, layout="sliced", options=(True,) * 5)
    signed = (quantized, False, quantized, False)
    torch.library.opcheck(scan.default, (), QCase(case, (quantized,) * 4, signed, quantized).arguments())


class Scan(torch.nn.Module):
    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Any:
        grid = (0.02, 120)
        options = {"dt_softplus": True, "initial_state": state, "out_scale": 0.05, "out_zero_point": 100}
        return torch.ops.mq_ao.qssd_scan(x, *grid, dt, *grid, A, B, *grid, C, *grid, **options)


def module_operands(batch: int, length: int) -> tuple[Tensor, ...]:
    arguments = QCase(replace(WHOLE, batch=batch, length=length)).arguments()
    return tuple(arguments[name] for name in ("x", "dt", "A", "B", "C", "initial_state"))


def test_exports_with_any_batch_and_length() -> None:
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    rows = {0: batch, 1: length}
    shapes = (rows, rows, None, rows, rows, {0: batch})
    program = torch.export.export(Scan(), module_operands(3, 6), dynamic_shapes=shapes).module()
    for sizes in ((1, 1), (2, 40)):
        for a, b in zip(program(*module_operands(*sizes)), Scan()(*module_operands(*sizes)), strict=True):
            assert torch.equal(a, b)


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "dtype": ({"x": Tensor.double}, "x must be uint8, int8 or float32"),
    "scale": ({"dt_scale": lambda _: 0.0}, "dt_scale must be positive"),
    "zero point": ({"C_zero_point": lambda _: 256}, "C_zero_point must lie in 0..255"),
    "signed zero point": ({"B": as_signed, "B_zero_point": lambda _: 128}, "B_zero_point must lie in -128..127"),
    "out_scale": ({"out_scale": lambda _: -1.0}, "out_scale must be positive"),
    "out_zero_point": ({"out_zero_point": lambda _: -1}, "out_zero_point must lie in 0..255"),
    "length": ({name: lambda x: x[:, :0] for name in (*ROWS, "seq_idx")}, "length 0"),
    "dt": ({"dt": lambda x: x[..., 1:]}, "dt must have shape"),
    "state": ({"initial_state": lambda x: x.to(torch.int8)}, "initial_state must be floating point"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_is_wrong(fault: str) -> None:
    spoilers, message = BAD[fault]
    arguments = QCase(replace(WHOLE, length=4, options=(True,) * 5), byte_output=True).arguments()
    for name, spoil in spoilers.items():
        arguments[name] = spoil(arguments[name])
    for call in (scan, reference):
        with pytest.raises(MqAoError, match=message):
            call(**arguments)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        scan(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})
