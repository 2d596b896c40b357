"""The Triton kernels of `mq_ao::ssd_scan` and `mq_ao::qssd_scan`, interpreted, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.ops.grids import Grid, dequantize
from mq_ao.ops.qssd_scan import qssd_scan
from mq_ao.ops.ssd_scan import ssd_scan
from tests.test_triton_scan import assert_near, assert_rounded, double, dtypes, tolerances

kernels = pytest.importorskip("mq_ao.ops.triton.ssd_scan", reason="needs Triton")
from mq_ao.ops.triton.launch import using  # noqa: E402

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """A drawn call of the operator.

    Attributes:
        skip: dimensions of D; 0 for none.
        options: whether there are a bias, softplus, limits, an initial state, sequences.
    """

    batch: int
    length: int
    groups: int
    group_heads: int
    headdim: int
    d_state: int
    skip: int
    options: tuple[bool, bool, bool, bool, bool]
    sliced: bool
    seed: int

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """By name, activations in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        bias, softplus, limits, state, sequences = self.options
        heads = self.groups * self.group_heads

        def rows(*width: int) -> Tensor:
            x = torch.randn(self.batch, self.length, *width[:-1], width[-1] + 3, generator=gen).to(dtype)
            x = x[..., 1:-2]
            return x if self.sliced else x.contiguous()

        skips = (None, torch.randn(heads, generator=gen), torch.randn(heads, self.headdim, generator=gen))
        state_shape = (self.batch, heads, self.headdim, self.d_state)
        return {
            "x": rows(heads, self.headdim),
            "dt": rows(heads) - 1 if softplus else rows(heads).abs() * 0.3,
            "A": -torch.rand(heads, generator=gen) * 8,
            "B": rows(self.groups, self.d_state),
            "C": rows(self.groups, self.d_state),
            "D": skips[self.skip],
            "dt_bias": torch.randn(heads, generator=gen).abs() * 0.5 if bias else None,
            "dt_softplus": softplus,
            "dt_min": 0.1 if limits else 0.0,
            "dt_max": 0.4 if limits else None,
            "initial_state": torch.randn(state_shape, generator=gen) if state else None,
            # Numbers come again, and sequences are shorter and longer than chunks.
            "seq_idx": torch.randint(0, 40, (self.batch, self.length), generator=gen) // 39 if sequences else None,
        }


cases = st.builds(
    Case,
    batch=st.sampled_from([1, 1, 1, 3]),
    length=st.sampled_from([1, 1, 2, 33, 64, 65, 130]),
    groups=st.sampled_from([1, 1, 2]),
    group_heads=st.sampled_from([1, 2]),
    headdim=st.sampled_from([1, 8, 16, 64, 80]),
    d_state=st.sampled_from([1, 8, 16, 64, 80, 128]),
    skip=st.integers(0, 2),
    options=st.tuples(*[st.booleans()] * 5),
    sliced=st.booleans(),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=15, deadline=None)
@given(cases, st.integers(0, 1))
def test_float32_is_near_float64(case: Case, config: int) -> None:
    arguments = case.arguments()
    with using(config):
        y, state = kernels.run(**arguments)
    exact, exact_state = ssd_scan.reference(**double(arguments))
    near, near_state = tolerances(ssd_scan.reference, arguments)
    assert y.dtype == state.dtype == torch.float32
    # Exponents within a chunk are differences of sums that reach hundreds, of which float32 keeps 1e-5.
    assert_near(y, exact, near)
    assert_near(state, exact_state, near_state)


@settings(max_examples=15, deadline=None)
@given(cases)
def test_bfloat16_is_rounded_at_the_end_alone(case: Case) -> None:
    arguments = case.arguments(torch.bfloat16)
    y, state = kernels.run(**arguments)
    exact, exact_state = ssd_scan.reference(**double(arguments))
    near, near_state = tolerances(ssd_scan.reference, arguments)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near(y, exact, 2**-8 * float(exact.abs().max()) + near)
    assert_near(state, exact_state, near_state)


@dataclass(frozen=True)
class QCase:
    """A drawn call: which operands are of 8 bits and of which kind, and the output."""

    case: Case
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    byte_output: bool

    def arguments(self) -> dict[str, Any]:
        arguments = self.case.arguments()
        for name, dtype in zip(("x", "dt", "B", "C"), self.dtypes, strict=True):
            x = arguments[name]
            low = 0 if dtype == torch.uint8 else -128
            scale, zero_point = float(x.abs().max()) / 100 + 1e-3, low + 130
            if dtype != torch.float32:
                q = (x / scale).round() + zero_point
                arguments[name] = q.clamp(low, low + 255).to(dtype)
            arguments |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point}
        if self.byte_output:
            arguments |= {"out_scale": 0.05, "out_zero_point": 117 if self.dtypes[0] != torch.int8 else -11}
        return arguments


qcases = st.builds(QCase, case=cases, dtypes=st.tuples(*[dtypes] * 4), byte_output=st.booleans())


@settings(max_examples=20, deadline=None)
@given(qcases, st.integers(0, 1))
def test_quantized_is_near_float64_and_rounded(qcase: QCase, config: int) -> None:
    arguments = qcase.arguments()
    with using(config):
        y, state = kernels.run_quantized(**arguments)
    values = {name: x for name, x in arguments.items() if not name.endswith(("_scale", "_zero_point"))}
    for name in ("x", "dt", "B", "C"):
        grid = Grid(arguments[f"{name}_scale"], arguments[f"{name}_zero_point"])
        values[name] = dequantize(arguments[name], grid)
    exact, exact_state = ssd_scan.reference(**double(values))
    near, near_state = tolerances(ssd_scan.reference, values)  # two halves leave 2^-18 = 0.4e-5
    assert [x.dtype for x in (y, state)] == [x.dtype for x in qssd_scan.reference(**arguments)]
    if qcase.byte_output:
        info = torch.iinfo(y.dtype)
        assert_rounded(y, exact / 0.05 + arguments["out_zero_point"], info.min, info.max, near / 0.05)
    else:
        assert_near(y, exact, near)
    assert_near(state, exact_state, near_state)


PLAIN = Case(1, 70, 1, 2, 16, 16, 1, (True,) * 5, False, 0)


@pytest.mark.parametrize("length", [1, 70])
def test_step_sizes_that_are_not_numbers_stay_so(length: int) -> None:
    arguments = replace(PLAIN, length=length).arguments()
    arguments["dt"][:, -1, 0] = float("nan")
    y, state = kernels.run(**arguments)
    assert bool(y[:, -1, 0].isnan().all()) and bool(state[:, 0].isnan().all())
    exact, exact_state = ssd_scan.reference(**double(arguments))
    near, near_state = (1e-5 * float(result.abs().max()) for result in (exact[:, :, 1], exact_state[:, 1]))
    assert_near(y[:, :, 1].contiguous(), exact[:, :, 1], near)
    assert_near(state[:, 1].contiguous(), exact_state[:, 1], near_state)


def test_float64_goes_to_the_reference() -> None:
    arguments = double(PLAIN.arguments())
    for got, expected in zip(kernels.run(**arguments), ssd_scan.reference(**arguments), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected)


def test_bad_operands_are_refused() -> None:
    arguments = PLAIN.arguments()
    with pytest.raises(MqAoError, match="x must be"):
        kernels.run(**{**arguments, "x": arguments["x"][0]})
    quantized = QCase(PLAIN, (torch.int8,) * 4, True).arguments()
    with pytest.raises(MqAoError, match="x_scale must be positive"):
        kernels.run_quantized(**{**quantized, "x_scale": 0.0})
    with pytest.raises(MqAoError, match="dt must have shape"):
        kernels.run_quantized(**{**quantized, "dt": quantized["dt"][:, :-1]})
