"""`mq_ao::qgate` and `mq_ao::qgate_per_token`: exact integers from equal floats, and floats next to float64's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mq_ao import MqAoError
from mq_ao.ops import hadamard_matrix as hm
from mq_ao.ops import qgate
from mq_ao.ops.linear_packed import int8_per_token

pytestmark = pytest.mark.usefixtures("native_kernels")
ops = torch.ops.mq_ao
quantize_per_tensor = torch.ops.quantized_decomposed.quantize_per_tensor

Call = tuple[Any, ...]
Y_SCALE, Y_ZERO, Z_SCALE, Z_ZERO = 0.013, 119, 0.047, 200


def operand(kind: torch.dtype, shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    if kind == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen)
    return torch.randn(shape, generator=gen) * 3


def call(y: Tensor, z: Tensor, s: Tensor | None, hadamard: bool) -> Call:
    return (y, Y_SCALE, Y_ZERO, z, Z_SCALE, Z_ZERO, s, hadamard)


def exact_gate(args: Call) -> Tensor:
    """What is quantized, in float64."""
    y, y_scale, y_zero, z, z_scale, z_zero, s, hadamard = args
    y = (y.double() - y_zero) * y_scale if y.dtype == torch.uint8 else y.double()
    z = (z.double() - z_zero) * z_scale if z.dtype == torch.uint8 else z.double()
    x = y * z * torch.sigmoid(z if s is None else z * s.double())
    return x @ hm.matrix(x.shape[-1]) if hadamard else x


cases = st.fixed_dictionaries(
    {
        "lead": st.sampled_from([(), (0,), (1,), (3,), (2, 5), (1, 0), (70,)]),
        "n": st.sampled_from([1, 2, 4, 12, 20, 48, 96, 192, 256, 576]),
        "odd": st.integers(0, 3),
        "kinds": st.tuples(*[st.sampled_from([torch.float32, torch.uint8])] * 2),
        "smooth": st.booleans(),
        "hadamard": st.booleans(),
        "strided": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def drawn(case: dict[str, Any]) -> Call:
    gen = torch.Generator().manual_seed(case["seed"])
    n = case["n"] if case["hadamard"] else case["n"] + case["odd"]
    wide = (*case["lead"], 2 * n + 5)
    y, z = (operand(kind, wide, gen)[..., n : 2 * n] for kind in case["kinds"])
    if not case["strided"]:
        y, z = y.contiguous(), z.contiguous()
    s = torch.rand(n, generator=gen) * 3 + 0.2 if case["smooth"] else None
    return call(y, z, s, case["hadamard"])


def assert_within_rounding(q: Tensor, steps: Tensor, low: int, high: int) -> None:
    """q is the rounding of `steps` (float64), but for what float32 arithmetic moves over a boundary."""
    # Float32 arithmetic errs by less than 1e-4 steps here: values of at most 255 steps with some ten roundings of
    # 2^-24 each, more only next to zero, where a rotated sum cancels larger ones.
    near = (steps - steps.floor() - 0.5).abs() < 1e-3
    rounded = steps.round().clamp(low, high)
    off = (q.double() - rounded).abs()
    assert (off <= near).all()


@settings(max_examples=80, deadline=None)
@given(case=cases, out_scale=st.sampled_from([0.05, 0.3]), out_zero=st.sampled_from([0, 77, 255]))
def test_static_integers_are_the_rounded_gate(case: dict[str, Any], out_scale: float, out_zero: int) -> None:
    args = drawn(case)
    q = qgate.qgate(*args, out_scale, out_zero)
    assert q.dtype == torch.uint8 and q.shape == args[0].shape and q.is_contiguous()
    for got in (q, qgate.qgate.reference(*args, out_scale, out_zero)):
        assert_within_rounding(got, exact_gate(args) / out_scale + out_zero, 0, 255)


@settings(max_examples=80, deadline=None)
@given(case=cases)
def test_token_integers_are_the_rounded_gate(case: dict[str, Any]) -> None:
    args = drawn(case)
    q, scale = qgate.qgate_per_token(*args)
    assert q.dtype == torch.uint8 and q.shape == args[0].shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (*q.shape[:-1], 1) and scale.is_contiguous()
    x = exact_gate(args)
    wanted = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    for got, got_scale in ((q, scale), qgate.qgate_per_token.reference(*args)):
        # The scale is the largest value of the row, after some ten roundings; rotated sums of n = 576 cancel.
        torch.testing.assert_close(got_scale.double(), wanted, rtol=1e-5, atol=0)
        assert_within_rounding(got, x / got_scale.double() + 128, 1, 255)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_integers_of_the_reference_hardly_ever_differ(kind: torch.dtype, hadamard: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    args = call(operand(kind, (64, 1536), gen), operand(kind, (64, 1536), gen), torch.rand(1536) + 0.5, hadamard)
    for q, wanted in (
        (ops.qgate(*args, 0.05, 120), qgate.qgate.reference(*args, 0.05, 120)),
        (ops.qgate_per_token(*args)[0], qgate.qgate_per_token.reference(*args)[0]),
    ):
        off = (q.int() - wanted.int()).abs()
        # Errors of about 1e-5 steps move as many values over one boundary; ten times that is allowed for.
        assert off.max() <= 1 and off.double().mean() < 1e-4


# sigmoid(256) is exactly 1 and products with 256 are exact, so is the rotation of integers by a matrix of order 4^k
# in float32: the kernels then quantize the very floats that are known here.
@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("hadamard", [False, True])
def test_equal_floats_give_equal_integers(n: int, hadamard: bool) -> None:
    gen = torch.Generator().manual_seed(n)
    y = torch.randint(-1000, 1000, (50, n), generator=gen).float()
    z = torch.full_like(y, 256.0)
    x = y * 256
    if hadamard:
        x = (x.double() @ hm.matrix(n)).float()
    for out_scale, zero in ((256.0, 3), (2048.0, 128), (511.3, 100)):
        q = ops.qgate(y, 1.0, 0, z, 1.0, 0, None, hadamard, out_scale, zero)
        assert torch.equal(q, quantize_per_tensor(x, out_scale, zero, 0, 255, torch.uint8))
    q, scale = ops.qgate_per_token(y, 1.0, 0, z, 1.0, 0, None, hadamard)
    wanted, wanted_scale = int8_per_token(x)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(q.int(), wanted.int() + 128)


def test_static_rounding_is_half_to_even_and_saturates() -> None:
    y = torch.arange(-40, 600)[None] * 0.5
    q = ops.qgate(y, 1.0, 0, torch.full_like(y, 256.0), 1.0, 0, None, False, 256.0, 3)
    assert torch.equal(q.float(), (torch.round(y) + 3).clamp(0, 255))


def test_smoothing_is_undone_by_the_next_weight() -> None:
    """S-SiLU of the smoothed z, times s, is the plain gate (docs/method.md, S2)."""
    gen = torch.Generator().manual_seed(1)
    y, z, s = torch.randn(8, 96, generator=gen), torch.randn(8, 96, generator=gen), torch.rand(96) + 0.5
    q, scale = ops.qgate_per_token(y, 1.0, 0, z / s, 1.0, 0, s, False)
    gate = (q.double() - 128) * scale.double() * s.double()
    exact = y.double() * torch.nn.functional.silu(z.double())
    # Half a step, with the roundings of z / s.
    assert ((gate - exact).abs() <= 0.501 * scale.double() * s.double()).all()


@pytest.mark.parametrize("hadamard", [False, True])
def test_special_rows_do_not_touch_their_neighbours(hadamard: bool) -> None:
    clean = torch.randn(6, 48)
    y, z = clean.clone(), torch.randn(6, 48)
    y[1] = 0
    y[2, 47] = torch.nan
    z[3, 0] = torch.inf
    args = (1.0, 0, z, 1.0, 0, None, hadamard)
    q, scale = ops.qgate_per_token(y, *args)
    assert (q[1:4] == 128).all()
    assert scale[1] == torch.finfo(torch.float32).tiny and scale[2:4].isnan().all()
    rest = [0, 4, 5]
    alone = ops.qgate_per_token(clean, *args)
    assert torch.equal(q[rest], alone[0][rest]) and torch.equal(scale[rest], alone[1][rest])
    assert torch.equal(ops.qgate(y, *args, 0.1, 9)[rest], ops.qgate(clean, *args, 0.1, 9)[rest])


def test_a_far_negative_gate_is_closed() -> None:
    z = torch.tensor([[-1e4, -200.0, -104.0, 0.0]])
    q = ops.qgate(torch.full_like(z, 1e6), 1.0, 0, z, 1.0, 0, None, False, 1e-3, 7)
    assert (q == 7).all()


def test_half_of_a_wider_tensor_is_read_in_place() -> None:
    gen = torch.Generator().manual_seed(2)
    for kind in (torch.float32, torch.uint8):
        wide = operand(kind, (2, 9, 192), gen)
        y, z = wide[..., :96], wide[..., 96:]
        assert torch.equal(
            ops.qgate(*call(y, z, None, True), 0.1, 5),
            ops.qgate(*call(y.contiguous(), z.contiguous(), None, True), 0.1, 5),
        )
        moved = ops.qgate(*call(y.transpose(0, 1), z.transpose(0, 1), None, True), 0.1, 5)
        assert torch.equal(moved.transpose(0, 1), ops.qgate(*call(y, z, None, True), 0.1, 5))


def test_bits_do_not_depend_on_threads() -> None:
    gen = torch.Generator().manual_seed(3)
    y, z = operand(torch.float32, (150, 385), gen), operand(torch.uint8, (150, 385), gen)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            args = call(y, z, None, False)
            results.append((ops.qgate(*args, 0.1, 3), *ops.qgate_per_token(*args)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_opcheck(kind: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(4)
    y, z = operand(torch.float32, (3, 2, 24), gen).transpose(0, 1), operand(kind, (2, 3, 48), gen)[..., 24:]
    torch.library.opcheck(ops.qgate.default, (*call(y, z, torch.ones(24), True), 0.1, 3))
    torch.library.opcheck(ops.qgate_per_token.default, call(y, z, None, False))


class Gate(torch.nn.Module):
    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        args = (y * 2, 1.0, 0, z, Z_SCALE, Z_ZERO, None, True)
        return qgate.qgate(*args, 0.1, 3), *qgate.qgate_per_token(*args)


def test_exports_with_dynamic_rows_and_compiles() -> None:
    gen = torch.Generator().manual_seed(5)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=1)}
    example = operand(torch.float32, (2, 3, 48), gen), operand(torch.uint8, (2, 3, 48), gen)
    program = torch.export.export(Gate(), example, dynamic_shapes=(shape, shape))
    inputs = operand(torch.float32, (5, 1, 48), gen), operand(torch.uint8, (5, 1, 48), gen)
    wanted = Gate()(*inputs)
    for run in (program.module(), torch.compile(Gate(), fullgraph=True)):
        assert all(torch.equal(a, b) for a, b in zip(run(*inputs), wanted, strict=True))


Y, Q = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.uint8)
BAD_OPERANDS: list[tuple[str, Call]] = [
    ("one shape", (Y, 1.0, 0, Y[:, :4], 1.0, 0, None, False)),
    ("one shape", (Y, 1.0, 0, Y[0], 1.0, 0, None, False)),
    ("one shape", (Y[0, 0], 1.0, 0, Y[0, 0], 1.0, 0, None, False)),
    ("last axis is empty", (Y[:, :0], 1.0, 0, Y[:, :0], 1.0, 0, None, False)),
    ("y in float32 or uint8", (Y.double(), 1.0, 0, Y, 1.0, 0, None, False)),
    ("z in float32 or uint8", (Y, 1.0, 0, Q.to(torch.int8), 1.0, 0, None, False)),
    ("y_zero_point must lie in 0..255", (Q, 1.0, 256, Y, 1.0, 0, None, False)),
    ("z_zero_point must lie in 0..255", (Y, 1.0, 0, Q, 1.0, -1, None, False)),
    ("s must be a float32 vector of 8", (Y, 1.0, 0, Y, 1.0, 0, torch.ones(7), False)),
    ("s must be a float32 vector of 8", (Y, 1.0, 0, Y, 1.0, 0, torch.ones(8).double(), False)),
    ("order 6 exists", (Y[:, :6], 1.0, 0, Y[:, :6], 1.0, 0, None, True)),
]
GOOD = (Y, 1.0, 0, Q, 1.0, 0, None, False)
BAD_CALLS: list[tuple[str, str, Call]] = [
    *(("qgate_per_token", message, args) for message, args in BAD_OPERANDS),
    *(("qgate", message, (*args, 1.0, 0)) for message, args in BAD_OPERANDS),
    ("qgate", "out_scale must be positive", (*GOOD, 0.0, 0)),
    ("qgate", "out_scale must be positive", (*GOOD, float("nan"), 0)),
    ("qgate", "out_zero_point must lie in 0..255", (*GOOD, 1.0, 256)),
]


@pytest.mark.parametrize(("name", "message", "args"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name: str, message: str, args: Call) -> None:
    with pytest.raises(MqAoError, match=message):
        getattr(ops, name)(*args)
    with pytest.raises(MqAoError, match=message):
        getattr(ops, f"{name}_reference")(*args)
    with FakeTensorMode() as mode, pytest.raises(MqAoError, match=message):
        getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
