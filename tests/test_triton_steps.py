"""The Triton kernels of `mq_ao::int8_conv_step_` and `int8_scan_step_`, interpreted, against their references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.ops.int8_steps import int8_conv_step_, int8_scan_step_
from mq_ao.ops.linear_rows import linear_rows, linears_rows
from mq_ao.ops.qcausal_conv1d import qcausal_conv1d
from mq_ao.ops.selective_scan import selective_scan
from tests.steps import ConvCase, ScanCase

kernels = pytest.importorskip("mq_ao.ops.triton.int8_steps", reason="needs Triton")
from mq_ao.ops.triton.launch import using  # noqa: E402
from tests.test_triton_scan import (  # noqa: E402
    assert_near,
    assert_rounded,
    double,
    float_arguments,
    tolerances,
)

pytestmark = pytest.mark.gpu

LINEAR = ("q", "token_scale", "weight", "scale", "correction", "bias")
CONV = ("conv_weight", "conv_weight_scale", "conv_bias", "conv_state", "activation")


def on_a_border(steps: Tensor) -> Tensor:
    """Where values in steps are next to a half: float32 sums of few groups are off by less than a 1e-3 of a step."""
    return (steps - steps.floor() - 0.5).abs() < 1e-3


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    sizes = draw(st.sampled_from([(37,), (40, 37), (5, 48), (1, 33, 6), (20, 5, 30)]))
    group = draw(st.sampled_from([0, 0, 64, 128]))
    return ConvCase(
        batch=draw(st.sampled_from([1, 1, 3, 16, 17])),
        inputs=draw(st.sampled_from([16, 48, 272, 48, 70])),
        group=group,
        int4=group > 0 and draw(st.booleans()),
        narrow=group > 0 and draw(st.booleans()),
        sizes=sizes,
        piece=draw(st.integers(0, len(sizes) - 1)),
        taps=draw(st.integers(1, 4)),
        options=draw(st.tuples(*[st.booleans()] * 4)),
        activation=draw(st.sampled_from([None, "silu"])),
        rounded=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def pieces_of(arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The pieces of the linear, and where float32 may round them in another way."""
    names = (*LINEAR, "sizes", "out_scales", "out_zero_points", "group_size")
    count, scales = len(arguments["sizes"]), arguments["out_scales"]
    pieces = linears_rows.reference(*(arguments[name] for name in names))[:count]
    whole = linear_rows.reference(*(arguments[name] for name in LINEAR), None, 0, arguments["group_size"])
    borders = [
        on_a_border(piece.double() / scale) if scale else torch.zeros_like(piece, dtype=torch.bool)
        for piece, scale in zip(whole.split(arguments["sizes"], -1), scales, strict=True)
    ]
    return list(pieces), borders


@settings(max_examples=50, deadline=None)
@given(conv_cases(), st.integers(0, 2))
def test_a_convolution_follows_its_linear(case: ConvCase, config: int) -> None:
    arguments = case.arguments()
    before = arguments["conv_state"].clone()
    with using(config):
        got = kernels.run_conv(**arguments)
    pieces, borders = pieces_of(arguments)
    grid = (arguments["out_scales"][case.piece], arguments["out_zero_points"][case.piece])
    conv = [before if name == "conv_state" else arguments[name] for name in CONV]
    exact, last = qcausal_conv1d.reference(pieces[case.piece], *grid, *conv)
    assert all(result.shape == (0,) for result in got[len(pieces) :])
    # The inputs of a convolution reach its output and its state.
    sure = ~borders[case.piece]
    assert torch.equal(arguments["conv_state"].where(sure, 0.0), last.where(sure, 0.0))
    for place, (y, piece, border) in enumerate(zip(got, pieces, borders, strict=False)):
        assert y.is_contiguous() and y.shape == piece.shape
        if place != case.piece:
            assert y.dtype == piece.dtype
            torch.testing.assert_close(y[~border], piece[~border], rtol=1e-5, atol=1e-5)
            continue
        # Sums are exact; scale, bias and SiLU round in float32, a few ulp of the larger term.
        error = 1e-6 * (exact.abs() + 5)
        assert y.dtype == (torch.int8 if case.rounded else torch.float32)
        if case.rounded:
            steps = exact.double() / 0.05 + 3
            near = (steps - steps.floor() - 0.5).abs() <= error / 0.05
            assert ((y.double() - steps.round().clamp(-128, 127)).abs() <= near)[sure].all()
        else:
            assert ((y - exact).abs() <= error)[sure].all()


scan_cases = st.builds(
    ScanCase,
    batch=st.sampled_from([1, 1, 3, 16, 17]),
    rank=st.sampled_from([16, 48, 160, 48, 20]),
    channels=st.sampled_from([1, 7, 20, 40]),
    groups=st.sampled_from([None, None, 1, 2]),
    d_state=st.sampled_from([5, 8, 16, 64, 128, 130]),
    dtype=st.sampled_from([torch.int8, torch.int8, torch.uint8, torch.float32]),
    options=st.tuples(*[st.booleans()] * 5),
    int8_state=st.booleans(),
    rounded=st.booleans(),
    seed=st.integers(0, 2**20),
)


def scan_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Arguments of `selective_scan` that the call stands for, and the channels (batch, 1, channels) of a sure delta."""
    q, *linear = (arguments[name] for name in ("q", "weight", "scale", "correction", "bias"))
    scale, zero_point = arguments["delta_scale"], arguments["delta_zero_point"]
    names = [f"{name}{suffix}" for name in ("u", "B", "C") for suffix in ("", "_scale", "_zero_point")]
    values = {name: arguments[name] for name in [*names, "A", "D", "delta_bias", "delta_softplus"]}
    values |= {
        "delta": linear_rows.reference(q, None, *linear, scale, zero_point),
        "initial_state": arguments["state"].clone(),
    }
    values |= {"delta_scale": scale, "delta_zero_point": zero_point}
    if arguments["state_scale"] is not None:
        values["state_scale"] = arguments["state_scale"]
    return float_arguments(values), ~on_a_border(linear_rows.reference(q, None, *linear).double() / scale)


@settings(max_examples=50, deadline=None)
@given(scan_cases, st.integers(0, 2))
def test_a_scan_follows_its_linear(case: ScanCase, config: int) -> None:
    arguments = case.arguments()
    state, state_scale = arguments["state"], arguments["state_scale"]
    values, sure = scan_arguments(arguments)
    with using(config):
        y = kernels.run_scan(**arguments)
    exact, exact_state = selective_scan.reference(**double(values))
    near, near_state = tolerances(selective_scan.reference, values)
    wanted = int8_scan_step_.reference(**case.arguments())
    assert y.dtype == wanted.dtype and y.shape == wanted.shape and y.is_contiguous()
    of_states = sure.transpose(1, 2).expand_as(state)
    if case.rounded:
        info = torch.iinfo(y.dtype)
        steps = exact / 0.05 + arguments["out_zero_point"]
        assert_rounded(y[sure], steps[sure], info.min, info.max, near / 0.05)
    else:
        assert_near(y[sure], exact[sure], near)
    if state_scale is None:
        assert_near(state[of_states], exact_state[of_states], near_state)
    else:
        # Up or down, by the bits of the state itself.
        assert_rounded(state[of_states], (exact_state / state_scale)[of_states], -127, 127, near_state / 0.01, most=1.0)


def test_steps_are_those_of_the_sequence() -> None:
    case = ConvCase(batch=2, taps=4, options=(False, True, True, True), rounded=False)
    first = case.arguments()
    state = torch.zeros_like(first["conv_state"])
    gen = torch.Generator().manual_seed(1)
    tokens = torch.randint(-128, 128, (2, 6, case.inputs), dtype=torch.int8, generator=gen)
    outputs = [kernels.run_conv(**{**first, "q": q, "conv_state": state})[0] for q in tokens.split(1, 1)]
    pieces, _ = pieces_of({**first, "q": tokens})
    conv = [None if name == "conv_state" else first[name] for name in CONV]
    expected, last = qcausal_conv1d.reference(pieces[0], first["out_scales"][0], -11, *conv)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-6, atol=5e-6)
    assert torch.equal(state, last)


def test_values_that_are_not_numbers_are_rounded_as_by_the_reference() -> None:
    conv, scan = ConvCase().arguments(), ScanCase().arguments()
    conv["conv_state"][0, 1, 3] = torch.nan
    conv["bias"][5] = torch.nan
    scan["bias"][2] = torch.nan
    for name, run, arguments, state in (
        ("int8_conv_step_", kernels.run_conv, conv, "conv_state"),
        ("int8_scan_step_", kernels.run_scan, scan, "state"),
    ):
        copy = {**arguments, state: arguments[state].clone()}
        got, wanted = run(**arguments), getattr(torch.ops.mq_ao, f"{name}_reference")(**copy)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1, equal_nan=True)
        torch.testing.assert_close(arguments[state], copy[state], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("case", [ConvCase(taps=9), ConvCase(inputs=17), ConvCase(batch=20)], ids=str)
def test_what_the_kernel_does_not_take_is_done_by_two(case: ConvCase) -> None:
    arguments = case.arguments()
    states = [arguments["conv_state"].clone() for _ in range(2)]
    got = kernels.run_conv(**{**arguments, "conv_state": states[0]})
    wanted = int8_conv_step_.reference(**{**arguments, "conv_state": states[1]})
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(*states)


def test_a_state_may_be_strided() -> None:
    case = ScanCase(int8_state=False, rounded=False)
    dense, strided = case.arguments(), case.arguments()
    strided["state"] = dense["state"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(kernels.run_scan(**strided), kernels.run_scan(**dense), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(strided["state"], dense["state"], rtol=1e-5, atol=1e-5)


def test_bad_operands_leave_the_state_as_it_is() -> None:
    for run, arguments, state, bad in (
        (kernels.run_conv, replace(ConvCase(), batch=1).arguments(), "conv_state", {"piece": 2}),
        (kernels.run_scan, replace(ScanCase(), batch=1).arguments(), "state", {"u_scale": 0.0}),
    ):
        before = arguments[state].clone()
        with pytest.raises(MqAoError):
            run(**{**arguments, **bad})
        assert torch.equal(arguments[state], before)
