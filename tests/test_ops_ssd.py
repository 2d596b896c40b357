"""`mq_ao::ssd_scan`: the native kernel against the float64 reference."""

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

from mq_ao.errors import MqAoError
from mq_ao.ops.ssd_scan import ssd_scan
from tests.conftest import assert_same_bits_for_any_threads
from tests.test_ops_scan import BFLOAT16, FLOAT32, assert_near

pytestmark = pytest.mark.usefixtures("native_kernels")
scan = torch.ops.mq_ao.ssd_scan
reference = ssd_scan.reference

ROWS = ("x", "dt", "B", "C")
"""Arguments with a time axis, but for seq_idx."""


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
    layout: str
    seed: int

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments by name, their activations in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        heads = self.groups * self.group_heads
        bias, softplus, limits, state, sequences = self.options

        def rows(*width: int) -> Tensor:
            """(batch, length, *width), dense, a slice of wider rows, every row apart, or transposed."""
            if self.layout == "transposed":
                return torch.randn(self.batch, *width, self.length, generator=gen).to(dtype).movedim(-1, 1)
            if self.layout == "apart":
                wide = torch.randn(self.batch, self.length, *width[:-1], width[-1] + 3, generator=gen)
                return wide.to(dtype)[..., 1:-2]
            extra = 5 if self.layout == "sliced" else 0
            wide = torch.randn(self.batch, self.length, math.prod(width) + extra, generator=gen).to(dtype)
            return wide[..., extra // 2 : extra // 2 + math.prod(width)].unflatten(2, width)

        dt = rows(heads) - 1 if softplus else rows(heads).abs() * 0.3
        arguments: dict[str, Any] = {
            "x": rows(heads, self.headdim),
            "dt": dt,
            "A": -torch.rand(heads, generator=gen) * 8,
            "B": rows(self.groups, self.d_state),
            "C": rows(self.groups, self.d_state),
            "D": torch.randn((heads, self.headdim)[: self.skip], generator=gen) if self.skip else None,
            "dt_bias": torch.randn(heads, generator=gen).abs() * 0.5 if bias else None,
            "dt_softplus": softplus,
        }
        if limits:
            arguments |= {"dt_min": 0.2, "dt_max": 0.5}
        if state:
            arguments["initial_state"] = torch.randn(self.batch, heads, self.headdim, self.d_state, generator=gen)
        if sequences:
            starts = torch.rand(self.batch, self.length, generator=gen) < 0.1
            arguments["seq_idx"] = starts.cumsum(1).int()
        return arguments


# Around the vector widths (4, 8, 16), the tiles (8 rows, 2 vectors), the chunks (64 steps) and the few steps (12).
cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 1, 2, 3, 11, 12, 31, 64, 65, 130]),
    groups=st.integers(1, 3),
    group_heads=st.sampled_from([1, 2, 5, 17]),
    headdim=st.sampled_from([1, 7, 16, 33, 64]),
    d_state=st.sampled_from([1, 5, 8, 16, 33, 64, 128]),
    skip=st.integers(0, 2),
    options=st.tuples(*[st.booleans()] * 5),
    layout=st.sampled_from(["dense", "sliced", "apart", "transposed"]),
    seed=st.integers(0, 2**31),
)
WHOLE = Case(2, 140, 2, 3, 20, 24, 1, (True, True, False, True, False), "dense", 3)


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def part(arguments: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Arguments of steps [start, stop) alone."""
    names = [name for name in (*ROWS, "seq_idx") if name in arguments]
    return arguments | {name: arguments[name][:, start:stop] for name in names}


@settings(max_examples=120, deadline=None)
@given(case=cases)
def test_matches_float64(case: Case) -> None:
    arguments = case.arguments()
    y, state = scan(**arguments)
    y_exact, state_exact = reference(**double(arguments))
    assert y.dtype == state.dtype == torch.float32
    assert y.is_contiguous() and state.is_contiguous()
    assert_near(y, y_exact, FLOAT32)
    assert_near(state, state_exact, FLOAT32)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_bfloat16_rounds_only_the_result(case: Case) -> None:
    arguments = case.arguments(torch.bfloat16)
    y, state = scan(**arguments)
    y_exact, state_exact = reference(**double(arguments))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near(y, y_exact, BFLOAT16)
    assert_near(state, state_exact, FLOAT32)


@pytest.mark.parametrize("cut", [1, 11, 64, 100, 139])
def test_parts_carry_the_state(cut: int) -> None:
    arguments = WHOLE.arguments()
    y, state = scan(**arguments)
    first, carried = scan(**part(arguments, 0, cut))
    second, last = scan(**part(arguments, cut, 140) | {"initial_state": carried})
    # Other chunks, so other roundings.
    assert_near(torch.cat((first, second), dim=1), y.double(), 2 * FLOAT32)
    assert_near(last, state.double(), 2 * FLOAT32)


@pytest.mark.parametrize("starts", [[1], [5, 6, 7], [64], [63, 65, 100], list(range(1, 140))])
def test_sequences_do_not_see_each_other(starts: list[int]) -> None:
    arguments = WHOLE.arguments()
    seq_idx = torch.zeros(2, 140, dtype=torch.int64)
    for number, start in enumerate(starts):
        seq_idx[:, start:] = 7 - number  # not ascending: a change is what counts
    y, state = scan(**arguments, seq_idx=seq_idx)
    results = []
    for i, (start, stop) in enumerate(zip([0, *starts], [*starts, 140], strict=True)):
        alone = part(arguments, start, stop) | {"initial_state": arguments["initial_state"] if i == 0 else None}
        results.append(scan(**alone))
    assert_near(y, torch.cat([alone for alone, _ in results], dim=1).double(), 2 * FLOAT32)
    assert_near(state, results[-1][1].double(), 2 * FLOAT32)


def test_sequences_of_one_batch_element_are_its_own() -> None:
    arguments = WHOLE.arguments()
    seq_idx = torch.zeros(2, 140, dtype=torch.uint8)
    y_one, state_one = scan(**arguments, seq_idx=seq_idx)
    seq_idx[1, 70:] = 1
    y, state = scan(**arguments, seq_idx=seq_idx)
    assert torch.equal(y[0], y_one[0]) and torch.equal(state[0], state_one[0])
    assert not torch.equal(y[1, 70:], y_one[1, 70:])


@pytest.mark.parametrize("length", [3, 100])
def test_limits_come_after_the_softplus(length: int) -> None:
    arguments = replace(WHOLE, length=length).arguments()
    step = torch.nn.functional.softplus(arguments["dt"] + arguments["dt_bias"])
    assert (step < 0.3).any() and (step > 0.6).any()
    given_steps = arguments | {"dt": step.clamp(0.3, 0.6), "dt_bias": None, "dt_softplus": False}
    for actual, expected in zip(scan(**arguments, dt_min=0.3, dt_max=0.6), scan(**given_steps), strict=True):
        assert_near(actual, expected.double(), 2 * FLOAT32)
    # The default limit from below is 0, as in mamba_ssm.
    negative = given_steps | {"dt": -step}
    assert torch.equal(scan(**negative)[1], scan(**given_steps | {"dt": 0 * step})[1])
    assert torch.equal(scan(**arguments, dt_max=math.inf)[0], scan(**arguments)[0])


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("length", [3, 100])
def test_results_do_not_depend_on_threads(length: int, batch: int) -> None:
    # 6 heads are cut into ranges of their columns, 36 are not.
    arguments = replace(WHOLE, batch=batch, length=length, headdim=100, d_state=64).arguments()
    assert_same_bits_for_any_threads(lambda: scan(**arguments))


@pytest.mark.parametrize("length", [10, 40])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_output_and_nothing_else(length: int, poison: float) -> None:
    at = length - 5  # within a tile of the product
    arguments = replace(WHOLE, length=length).arguments()
    arguments["x"][1, at, 2, 13] = poison
    y, state = scan(**arguments)
    assert not y[1, at:, 2, 13].isfinite().any() and not state[1, 2, 13].isfinite().any()
    y[1, at:, 2, 13] = state[1, 2, 13] = 0.0
    assert y.isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("length", [2, 20])
def test_extreme_steps_forget_or_keep_everything(length: int) -> None:
    x, matrix = torch.zeros(1, length, 3, 16), torch.ones(1, length, 1, 16)
    start = torch.full((1, 3, 16, 16), 3.0)
    for step, rate, kept in ((0.0, -1.0, 3.0), (1e4, -1.0, 0.0), (1e30, -1.0, 0.0), (1.0, -math.inf, 0.0)):
        dt, A = torch.full((1, length, 3), step), torch.full((3,), rate)
        _, state = scan(x, dt, A, matrix, matrix, initial_state=start)
        torch.testing.assert_close(state, torch.full_like(state, kept), rtol=0, atol=0)


def test_steps_that_forget_do_not_blur_the_others() -> None:
    arguments = replace(WHOLE, options=(False, False, False, True, False)).arguments()
    dt, x = torch.full_like(arguments["dt"], 1e-3), arguments["x"].clone()
    # Exponents of some hundreds, thousands a chunk; without inputs, which would hide those of the small steps.
    dt[:, ::4] = 100.0
    x[:, ::4] = 0.0
    arguments |= {"dt": dt, "x": x, "D": None}
    y, state = scan(**arguments)
    y_exact, state_exact = reference(**double(arguments))
    assert_near(y, y_exact, FLOAT32)
    assert_near(state, state_exact, FLOAT32)


def test_other_dtypes_run_the_reference() -> None:
    arguments = replace(WHOLE, length=5).arguments()
    y, state = scan(**double(arguments))
    assert y.dtype == state.dtype == torch.float64
    y_half, state_half = scan(**arguments | {name: arguments[name].half() for name in ROWS})
    assert y_half.dtype == torch.float16 and state_half.dtype == torch.float32
    assert_near(y_half, y, 1e-2)  # operands in float16, of 11 bits


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, Any], seed: int
) -> dict[str, Tensor]:
    """Gradients of a random combination of the results, by argument."""
    tensors = {name: x.detach() for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for x in tensors.values():
        x.requires_grad_()
    results = function(**arguments | tensors)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    found = torch.autograd.grad(results, list(tensors.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(tensors.items(), found, strict=True)
    }


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_gradients_match_autograd_through_the_reference(case: Case) -> None:
    arguments = double(case.arguments())
    exact = gradients(reference, arguments, case.seed + 1)
    for name, grad in gradients(scan, arguments, case.seed + 1).items():
        # In float64 the chunks add up the same numbers in another order; entries are sums of up to millions of them.
        assert_near(grad, exact[name], 1e-10)


def test_gradients_in_float32_are_near_those_in_float64() -> None:
    arguments = Case(2, 300, 2, 3, 32, 24, 1, (True, True, False, True, False), "dense", 3).arguments()
    exact = gradients(scan, double(arguments), 0)
    for name, grad in gradients(scan, arguments, 0).items():
        assert grad.dtype == torch.float32
        assert_near(grad, exact[name], FLOAT32)


@pytest.mark.parametrize("sequences", [False, True])
def test_gradient_is_the_derivative(sequences: bool) -> None:
    case = Case(2, 7, 2, 2, 3, 2, 2, (True, True, False, True, sequences), "dense", 3)
    arguments = double(case.arguments())
    tensors = {
        name: x.requires_grad_()
        for name, x in arguments.items()
        if x is not None and x is not True and name != "seq_idx"
    }

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        return scan(**arguments | dict(zip(tensors, given, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_out_is_resized_and_written() -> None:
    arguments = replace(WHOLE, length=5).arguments()
    outs = torch.empty(0), torch.empty(0)
    results = scan.out(**arguments, out0=outs[0], out1=outs[1])
    for result, out, expected in zip(results, outs, scan(**arguments), strict=True):
        assert result is out
        assert torch.equal(out, expected)


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "empty": ({name: lambda x: x[:, :0] for name in (*ROWS, "seq_idx")}, "length 0"),
    "rank": ({"x": lambda x: x[0]}, "x must be"),
    "integer": ({"x": Tensor.int}, "floating point"),
    "dt": ({"dt": lambda x: x[..., 1:]}, "dt must have shape"),
    "dtype": ({"B": Tensor.bfloat16}, "share a dtype"),
    "A": ({"A": lambda x: x[:, None]}, "A must have shape"),
    "B": ({"B": lambda x: x[:, :, 0]}, "B must be"),
    "C": ({"C": lambda x: x[..., 1:]}, "C must have shape"),
    "groups": ({name: lambda x: x.repeat(1, 1, 2, 1) for name in ("B", "C")}, "6 heads cannot be divided into the 4"),
    "no groups": ({name: lambda x: x[:, :, :0] for name in ("B", "C")}, "no groups"),
    "D": ({"D": lambda x: x[1:]}, "D must have shape"),
    "D's rank": ({"D": lambda x: x[None, None]}, "D must be"),
    "bias": ({"dt_bias": lambda x: x[None]}, "dt_bias must have shape"),
    "state": ({"initial_state": lambda x: x.transpose(2, 3)}, "initial_state must have shape"),
    "state's dtype": ({"initial_state": Tensor.int}, "initial_state must be floating point"),
    "seq_idx": ({"seq_idx": lambda x: x[0]}, "seq_idx must have shape"),
    "seq_idx's dtype": ({"seq_idx": Tensor.float}, "seq_idx must be integers"),
    "limits": ({"dt_min": lambda _: 0.6}, "dt_min must not exceed dt_max"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_is_wrong(fault: str) -> None:
    spoilers, message = BAD[fault]
    arguments = replace(WHOLE, length=4, options=(True,) * 5).arguments()
    for name, spoil in spoilers.items():
        arguments[name] = spoil(arguments[name])
    for call in (scan, reference):
        with pytest.raises(MqAoError, match=message):
            call(**arguments)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        scan(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("options", [(True,) * 5, (False,) * 5])
def test_opcheck(length: int, options: tuple[bool, bool, bool, bool, bool]) -> None:
    torch.library.opcheck(scan.default, (), replace(WHOLE, length=length, options=options).arguments())


class Scan(torch.nn.Module):
    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.mq_ao.ssd_scan(x, dt, A, B, C, dt_softplus=True, initial_state=state)


def module_operands(batch: int, length: int) -> tuple[Tensor, ...]:
    arguments = replace(WHOLE, batch=batch, length=length).arguments()
    return tuple(arguments[name] for name in ("x", "dt", "A", "B", "C", "initial_state"))


def test_exports_with_any_batch_and_length() -> None:
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    rows = {0: batch, 1: length}
    shapes = (rows, rows, None, rows, rows, {0: batch})
    program = torch.export.export(Scan(), module_operands(3, 6), dynamic_shapes=shapes).module()
    for sizes in ((1, 1), (2, 40)):
        for a, b in zip(program(*module_operands(*sizes)), Scan()(*module_operands(*sizes)), strict=True):
            assert torch.equal(a, b)


def test_compiles() -> None:
    operands = module_operands(2, 6)
    compiled = torch.compile(Scan(), fullgraph=True)
    for a, b in zip(compiled(*operands), Scan()(*operands), strict=True):
        assert torch.equal(a, b)
