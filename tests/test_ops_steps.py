"""`mq_ao::int8_conv_step_` and `int8_scan_step_`: references, shape functions and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mq_ao import MqAoError
from tests.steps import ConvCase, ScanCase

mq = torch.ops.mq_ao
LINEAR = ("q", "token_scale", "weight", "scale", "correction", "bias", "sizes", "out_scales", "out_zero_points")
CONV = ("conv_weight", "conv_weight_scale", "conv_bias", "conv_state", "activation", "conv_out_scale")
OF_LINEAR = ("q", "weight", "scale", "correction", "bias", "delta_scale", "delta_zero_point")


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0, 64]), st.integers(0, 1), st.booleans(), st.integers(1, 4), st.integers(0, 2**20))
def test_a_convolution_step_is_two_operators_and_a_copy(
    group: int, piece: int, rounded: bool, taps: int, seed: int
) -> None:
    arguments = ConvCase(group=group, piece=piece, rounded=rounded, taps=taps, seed=seed).arguments()
    pieces = list(mq.linears_rows(*(arguments[name] for name in LINEAR), group))
    grid = (arguments["out_scales"][piece], arguments["out_zero_points"][piece])
    conv = [arguments[name] for name in CONV]
    pieces[piece], last = mq.qcausal_conv1d(pieces[piece], *grid, *conv, 3)
    got = mq.int8_conv_step_(**arguments)
    for y, expected in zip((*got, arguments["conv_state"]), (*pieces, last), strict=True):
        assert y.dtype == expected.dtype and torch.equal(y, expected)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([None, 2]), st.booleans(), st.booleans(), st.integers(0, 2**20))
def test_a_scan_step_is_two_operators_and_a_copy(
    groups: int | None, int8_state: bool, rounded: bool, seed: int
) -> None:
    arguments = ScanCase(groups=groups, int8_state=int8_state, rounded=rounded, seed=seed).arguments()
    q, *rest, scale, zero_point = (arguments[name] for name in OF_LINEAR)
    scan = {name: value for name, value in arguments.items() if name not in OF_LINEAR[:5]}
    scan["delta"] = mq.linear_rows(q, None, *rest, scale, zero_point)
    scan["initial_state"] = scan.pop("state")
    y, last = mq.qselective_scan(**scan)
    got = mq.int8_scan_step_(**arguments)
    assert got.dtype == y.dtype and torch.equal(got, y)
    assert arguments["state"].dtype == last.dtype and torch.equal(arguments["state"], last)


@pytest.mark.parametrize("rounded", [False, True])
def test_opcheck(rounded: bool) -> None:
    conv = ConvCase(rounded=rounded, group=64 * rounded, int4=rounded, sizes=(3, 8, 5), piece=1)
    torch.library.opcheck(mq.int8_conv_step_.default, (), conv.arguments())
    torch.library.opcheck(mq.int8_scan_step_.default, (), ScanCase(rounded=rounded, int8_state=rounded).arguments())


class Steps(torch.nn.Module):
    """A convolution's step whose state is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments = ConvCase(batch=2).arguments()
        self.register_buffer("conv_state", self.arguments.pop("conv_state"))

    def forward(self, q: Tensor) -> tuple[Tensor, ...]:
        return tuple(mq.int8_conv_step_(**{**self.arguments, "q": q, "conv_state": self.conv_state}))


def test_a_compiled_program_changes_the_state() -> None:
    plain, compiled = Steps(), Steps()
    for _ in range(2):
        q = plain.arguments["q"]
        for y, expected in zip(torch.compile(compiled, fullgraph=True)(q), plain(q), strict=True):
            assert torch.equal(y, expected)
    assert torch.equal(compiled.conv_state, plain.conv_state)


BAD_CONV: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "rank": ({"q": lambda x: x[:, 0], "token_scale": lambda x: x[:, 0]}, r"q must be \(batch, 1, K\), it has 2"),
    "steps": ({"q": lambda x: x.repeat(1, 2, 1), "token_scale": lambda x: x.repeat(1, 2, 1)}, "takes one step"),
    "weight": ({"weight": lambda x: x[:, 1:].contiguous()}, "the weight has 47 inputs"),
    "piece": ({"piece": lambda _: 2}, "reads piece 2, which must be one of 2 and rounded"),
    "negative piece": ({"piece": lambda _: -1}, "reads piece -1"),
    "float piece": ({"out_scales": lambda _: [0.0, 0.1]}, "reads piece 0, which must be one of 2 and rounded"),
    "taps": ({"conv_weight": lambda x: x[1:]}, r"weight must have shape \(40, 4\)"),
    "tap dtype": ({"conv_weight": Tensor.float}, "weight must be int8"),
    "tap scale": ({"conv_weight_scale": lambda x: x[1:]}, "weight_scale must be float32"),
    "state": ({"conv_state": lambda x: x[:, 1:]}, r"initial_state must have shape \(3, 3, 40\)"),
    "state dtype": ({"conv_state": Tensor.double}, "conv_state must be torch.float32"),
    "activation": ({"activation": lambda _: "gelu"}, "unknown activation 'gelu'"),
    "out": ({"conv_out_zero_point": lambda _: 200}, "out_zero_point must lie in -128..127"),
}
BAD_SCAN: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "rank": ({"q": lambda x: x[:, 0]}, r"q must be \(batch, 1, K\), it has 2"),
    "steps": ({"q": lambda x: x.repeat(1, 2, 1)}, "takes one step"),
    "weight": ({"weight": lambda x: x[:-1], "scale": lambda x: x[:-1]}, "int32|bias must be"),
    "delta": ({"delta_scale": lambda _: 0.0}, "out_scale must be positive"),
    "channels": ({"u": lambda x: x[..., 1:]}, "delta must have shape"),
    "u": ({"u_zero_point": lambda _: 200}, "u_zero_point must lie in -128..127"),
    "A": ({"A": lambda x: x[1:], "state_scale": lambda x: x[1:]}, "A must have shape"),
    "state": ({"state": lambda x: x[:, 1:]}, "initial_state must have shape"),
    "state dtype": ({"state": Tensor.float}, "state must be torch.int8"),
    "float state": ({"state_scale": lambda _: None}, "state must be torch.float32"),
    "out": ({"out_scale": lambda _: -1.0}, "out_scale must be positive"),
}


def refuses(operator: str, state: str, arguments: dict[str, Any], message: str) -> None:
    before = arguments[state].clone()
    for call in (getattr(mq, operator), getattr(mq, f"{operator}_reference")):
        with pytest.raises(MqAoError, match=message):
            call(**arguments)
    assert torch.equal(arguments[state], before)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        getattr(mq, operator)(**fakes)


@pytest.mark.parametrize("fault", BAD_CONV)
def test_bad_operands_of_a_convolution_leave_the_state_as_it_is(fault: str) -> None:
    spoilers, message = BAD_CONV[fault]
    arguments = replace(ConvCase(), options=(True, True, True, True)).arguments()
    arguments |= {name: spoil(arguments[name]) for name, spoil in spoilers.items()}
    refuses("int8_conv_step_", "conv_state", arguments, message)


@pytest.mark.parametrize("fault", BAD_SCAN)
def test_bad_operands_of_a_scan_leave_the_state_as_it_is(fault: str) -> None:
    spoilers, message = BAD_SCAN[fault]
    arguments = ScanCase().arguments()
    arguments |= {name: spoil(arguments[name]) for name, spoil in spoilers.items()}
    refuses("int8_scan_step_", "state", arguments, message)
