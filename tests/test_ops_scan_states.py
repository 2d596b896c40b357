"""`mq_ao::scan_states`: every state, against float64 and against what `selective_scan` makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops.scan_states import scan_states
from tests.test_ops_scan import FLOAT32, Case, assert_near, cases, double

pytestmark = pytest.mark.usefixtures("native_kernels")
states = torch.ops.mq_ao.scan_states
reference = scan_states.reference


def split(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor | bool | None], Tensor, Tensor | None]:
    """The operands of `scan_states`, and C and D."""
    u, delta, A, B, C, D, bias, softplus, state = case.operands(dtype)
    return [u, delta, A, B, bias, softplus, state], C, D


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_states_match_float64_and_give_the_scan(case: Case) -> None:
    operands, C, D = split(case)
    u, delta, A, B, bias, softplus, start = operands
    h, last = states(*operands)
    h_exact, last_exact = reference(*double(operands))
    assert h.dtype == last.dtype == torch.float32
    assert h.is_contiguous() and last.is_contiguous()
    assert_near(h, h_exact, FLOAT32)
    assert_near(last, last_exact, FLOAT32)
    assert torch.equal(h[:, -1], last)
    y, scan_last = torch.ops.mq_ao.selective_scan(u, delta, A, B, C, D, bias, softplus, start)
    per_channel = C.unsqueeze(2) if C.dim() == 3 else C.repeat_interleave(case.group_channels, dim=2)
    product = (h.double() * per_channel).sum(-1)
    if D is not None:
        product = product + D.double() * u
    # Both sides start from the same float32 states; y rounds in its sum.
    assert_near(y, product, FLOAT32)
    assert_near(scan_last, last.double(), FLOAT32)
    if case.length > 1:
        # One recurrence computes both.
        assert torch.equal(scan_last, last)


def test_float64_and_half_precision_run_the_reference() -> None:
    operands, _, _ = split(Case(1, 4, None, 7, 5, (True,) * 4, "dense", 0))
    h, last = states(*double(operands))
    assert h.dtype == last.dtype == torch.float64
    half, _, _ = split(Case(1, 4, None, 7, 5, (True,) * 4, "dense", 0), torch.bfloat16)
    h_half, last_half = states(*half)
    assert h_half.dtype == last_half.dtype == torch.float32
    # States are float32 of the rounded operands.
    assert_near(h_half, reference(*double(half))[0], FLOAT32)


def test_results_do_not_depend_on_threads() -> None:
    operands, _, _ = split(Case(3, 40, 2, 150, 16, (True,) * 4, "dense", 1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(states(*operands))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


BAD = {
    "empty": (0, lambda u: u[:, :0], "length 0"),
    "rank": (0, lambda u: u[0], "u must be"),
    "integer": (0, lambda u: u.int(), "floating point"),
    "delta": (1, lambda x: x[..., 1:], "delta must have shape"),
    "dtype": (1, lambda x: x.bfloat16(), "share a dtype"),
    "A": (2, lambda x: x[1:], "A must have shape"),
    "B": (3, lambda x: x[..., :1], "B must have shape"),
    "bias": (4, lambda x: x[None], "delta_bias must have shape"),
    "state": (6, lambda x: x.transpose(1, 2), "initial_state must have shape"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_is_wrong(fault: str) -> None:
    position, spoil, message = BAD[fault]
    operands, _, _ = split(Case(2, 4, None, 6, 5, (True,) * 4, "dense", 0))
    operands[position] = spoil(operands[position])
    if fault == "empty":
        operands[1], operands[3] = (operands[i][:, :0] for i in (1, 3))
    with pytest.raises(MqAoError, match=message):
        states(*operands)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_opcheck(length: int, groups: int | None) -> None:
    operands, _, _ = split(Case(2, length, groups, 8, 16, (True,) * 4, "sliced", 0))
    torch.library.opcheck(states.default, tuple(operands))


class States(torch.nn.Module):
    def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.mq_ao.scan_states(u, delta, A, B, None, True)


def test_exports_with_any_batch_and_length_and_compiles() -> None:
    def operands(batch: int, length: int) -> tuple[Tensor, ...]:
        return tuple(split(Case(batch, length, None, 8, 4, (False, False, True, False), "dense", 0))[0][:4])

    rows = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    program = torch.export.export(States(), operands(3, 6), dynamic_shapes=(rows, rows, None, rows)).module()
    compiled = torch.compile(States(), fullgraph=True)
    for sizes in ((1, 1), (2, 40)):
        expected = States()(*operands(*sizes))
        for call in (program, compiled):
            assert all(torch.equal(a, b) for a, b in zip(call(*operands(*sizes)), expected, strict=True))
