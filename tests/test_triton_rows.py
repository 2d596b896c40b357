"""Triton kernels that take whole rows, interpreted: gate, rotation, norm and rounding against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

from mq_ao.ops import hadamard_matrix as hm
from mq_ao.ops.gate import gate
from mq_ao.ops.hadamard import hadamard
from mq_ao.ops.triton import int8_gate, int8_rms_norm
from mq_ao.ops.triton.rotation import rotation
from tests.test_int8_rows import gates, norms

pytestmark = pytest.mark.gpu

# Ten to twenty roundings of 2^-24, and those of the rotation's split products, 2^-21, against the row's largest value.
TOLERANCE = 1e-5


def assert_next_to(x: Tensor, wanted: Tensor) -> None:
    """Checks float32 rows against float64 ones."""
    assert x.shape == wanted.shape
    if x.numel():
        size = wanted.abs().amax(-1, keepdim=True)
        assert ((x.double() - wanted).abs() <= TOLERANCE * size).all()


def assert_rounded(got: tuple[Tensor, Tensor], wanted: Tensor, case: dict[str, Any]) -> None:
    """Checks integers and scales for float64 rows: off by one step at most, and only next to a boundary."""
    q, scale = got
    assert q.dtype == torch.int8 and q.shape == wanted.shape
    if case["out_scale"] is None:
        largest = wanted.abs().amax(-1, keepdim=True) if wanted.numel() else wanted[..., :1]
        torch.testing.assert_close(
            scale.double(), (largest / 127).clamp(min=torch.finfo(torch.float32).tiny), rtol=TOLERANCE, atol=0
        )
        steps, low, high = wanted / scale.double(), -127, 127
        error = torch.full_like(wanted, 127 * TOLERANCE)
    else:
        assert scale.shape == (0,)
        steps, low, high = wanted / case["out_scale"] + case["out_zero_point"], -128, 127
        size = wanted.abs().amax(-1, keepdim=True) if wanted.numel() else wanted[..., :1]
        error = (TOLERANCE * size / case["out_scale"]).expand_as(wanted)
    near = (steps - steps.floor() - 0.5).abs() <= error
    assert ((q.double() - steps.round().clamp(low, high)).abs() <= near).all()


def exact_gate(case: dict[str, Any]) -> Tensor:
    """What is rounded, in float64."""
    y, z = (
        case[name].double()
        if case[name].dtype == torch.float32
        else (case[name].double() - case[f"{name}_zero_point"]) * case[f"{name}_scale"]
        for name in ("y", "z")
    )
    x = y * z * torch.sigmoid(z if case["s"] is None else z * case["s"].double())
    return x @ hm.matrix(x.shape[-1]) if case["hadamard"] else x


@settings(max_examples=60, deadline=None)
@given(gates())
def test_the_gate_rounds_what_float64_gives(case: dict[str, Any]) -> None:
    assert_rounded(int8_gate.run(**case), exact_gate(case), case)


@settings(max_examples=30, deadline=None)
@given(gates())
def test_the_float_gate_is_next_to_float64(case: dict[str, Any]) -> None:
    case = {**case, "y": case["y"].float(), "z": case["z"].float() / 30}
    got = int8_gate.run_gate(case["y"], case["z"], case["s"], case["hadamard"])
    assert_next_to(got, exact_gate(case))


ORDERS = [1, 2, 8, 16, 20, 24, 28, 40, 56, 64, 128, 256, 384, 576, 768, 1536, 2048, 3072, 4096, 5120, 8192]


@pytest.mark.parametrize("n", ORDERS)
def test_rotations_of_every_kind(n: int) -> None:
    assert rotation(n) is not None
    gen = torch.Generator().manual_seed(n)
    x, scale = torch.randn(3, 2 * n, generator=gen)[:, :n], torch.rand(n, generator=gen) + 0.5
    wanted = hadamard.reference(x.double() * scale.double())
    assert_next_to(int8_gate.run_hadamard(x, scale), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotations_round_to_their_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = hadamard.reference(x.double())
    got = int8_gate.run_hadamard(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted.to(dtype))


@pytest.mark.parametrize(("n", "dtype"), [(108, torch.float32), (32768, torch.float32), (96, torch.float64)])
def test_what_no_program_holds_goes_to_the_reference(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if n == 32768:  # whose matrix takes 8 GB: without it
        assert rotation(n) is None
        torch.testing.assert_close(int8_gate.run_gate(x, x), gate.reference(x, x))
    else:
        torch.testing.assert_close(int8_gate.run_hadamard(x), hadamard.reference(x))


def exact_norm(case: dict[str, Any]) -> Tensor:
    x = case["x"].double() if case["residual"] is None else (case["x"] + case["residual"]).double()
    x = x * (x.square().mean(-1, keepdim=True) + case["eps"]).rsqrt()
    return x if case["weight"] is None else x * case["weight"].double()


@settings(max_examples=60, deadline=None)
@given(norms())
def test_the_norm_rounds_what_float64_gives(case: dict[str, Any]) -> None:
    *got, total = int8_rms_norm.run(**case)
    assert_rounded((got[0], got[1]), exact_norm(case), case)
    if case["residual"] is None:
        assert total.shape == (0,)
    else:
        assert torch.equal(total, case["x"] + case["residual"])


@pytest.mark.parametrize("hadamard", [False, True])
def test_integers_hardly_ever_differ_from_the_reference(hadamard: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    y, z = (torch.randint(-128, 128, (8, 1536), dtype=torch.int8, generator=gen) for _ in range(2))
    s, x = torch.rand(1536, generator=gen) + 0.5, torch.randn(8, 1536, generator=gen)
    pairs = []
    for out_scale in (None, 0.05):
        args = (y, 0.013, -9, z, 0.047, 72, s, hadamard, out_scale, 7)
        pairs.append((int8_gate.run(*args), torch.ops.mq_ao.int8_gate_reference(*args)))
        args = (x, x.flip(0), s, 1e-5, out_scale, 7)
        pairs.append((int8_rms_norm.run(*args), torch.ops.mq_ao.int8_rms_norm_reference(*args)))
    for (q, scale, *_), (wanted, wanted_scale, *_) in pairs:
        torch.testing.assert_close(scale, wanted_scale, rtol=TOLERANCE, atol=0)
        off = (q.int() - wanted.int()).abs()
        # Errors of about 1e-5 steps move as many values over one boundary; ten times that is allowed for.
        assert off.max() <= 1 and off.double().mean() < 2e-4


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, which interprets, on infinity less itself
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_by_itself(value: float) -> None:
    x = torch.ones(3, 12)
    x[1, 2] = value
    for q, scale, *_ in (
        int8_gate.run(x, 1.0, 0, x, 1.0, 0, None, False),
        int8_gate.run(x, 1.0, 0, x, 1.0, 0, None, True),
        int8_rms_norm.run(x, None, None, 1e-5),
    ):
        assert scale.isnan().flatten().tolist() == [False, True, False]
        assert (q[1] == 0).all() and (q[0] != 0).any() and torch.equal(q[0], q[2])
    zero = torch.zeros(2, 12)
    for q, scale, *_ in (
        int8_gate.run(zero, 1.0, 0, zero, 1.0, 0, None, True),
        int8_rms_norm.run(zero, None, None, 0.1),
    ):
        assert (q == 0).all() and (scale == torch.finfo(torch.float32).tiny).all()
    q, _, _ = int8_rms_norm.run(torch.full((1, 4), torch.nan), None, None, 1e-5, 0.1, 3)
    assert (q == -128).all()


def test_other_configurations_give_the_same() -> None:
    from mq_ao.ops.triton.launch import using

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 48, generator=gen)
    with using(1):
        got = int8_gate.run_hadamard(x)
    assert torch.equal(got, int8_gate.run_hadamard(x))
