"""`mq_ao::int8_gate` and `mq_ao::int8_rms_norm`: what they stand for, node by node, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.ops import hadamard_matrix as hm
from mq_ao.ops import int8_gate, int8_rms_norm
from mq_ao.ops.hadamard import hadamard
from mq_ao.ops.linear_packed import int8_per_token

mq, aten, qd = torch.ops.mq_ao, torch.ops.aten, torch.ops.quantized_decomposed

LEADS = [(), (1,), (3,), (2, 5), (0,)]


def drawn_operand(gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Tensor:
    """Values of a wider tensor or of one of that shape."""
    wide = (*shape[:-1], shape[-1] * (1 + strided))
    if dtype == torch.int8:
        values = torch.randint(-128, 128, wide, dtype=torch.int8, generator=gen)
    else:
        values = torch.randn(wide, generator=gen) * 3
    return values[..., : shape[-1]]


def same_steps(got: tuple[Tensor, Tensor], x: Tensor, out_scale: float | None, out_zero_point: int) -> None:
    """Checks the integers and scales of float rows x, which the graph's own operators would give."""
    if out_scale is not None:
        assert torch.equal(got[0], qd.quantize_per_tensor(x, out_scale, out_zero_point, -128, 127, torch.int8))
        assert got[1].shape == (0,)
    else:
        q, scale = int8_per_token(x)
        assert torch.equal(got[0], q) and torch.equal(got[1], scale)


@st.composite
def gates(draw: st.DrawFn) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    hadamard = draw(st.booleans())
    n = draw(st.sampled_from([1, 2, 4, 12, 20, 24, 48, 96, 224])) + (0 if hadamard else draw(st.integers(0, 3)))
    shape, strided = (*draw(st.sampled_from(LEADS)), n), draw(st.booleans())
    y, z = (drawn_operand(gen, shape, draw(st.sampled_from([torch.int8, torch.float32])), strided) for _ in range(2))
    return {
        "y": y,
        "y_scale": 0.013,
        "y_zero_point": -9,
        "z": z,
        "z_scale": 0.047,
        "z_zero_point": 72,
        "s": torch.rand(n, generator=gen) * 3 + 0.2 if draw(st.booleans()) else None,
        "hadamard": hadamard,
        "out_scale": draw(st.sampled_from([None, 0.05])),
        "out_zero_point": draw(st.sampled_from([0, -128, 31])),
    }


@settings(max_examples=80, deadline=None)
@given(gates())
def test_the_gate_is_that_of_the_graph(case: dict[str, Any]) -> None:
    y, z = (
        case[name]
        if case[name].dtype == torch.float32
        else qd.dequantize_per_tensor(
            case[name], case[f"{name}_scale"], case[f"{name}_zero_point"], -128, 127, torch.int8
        )
        for name in ("y", "z")
    )
    s = case["s"]
    x = aten.mul.Tensor(y, aten.mul.Tensor(z, aten.sigmoid.default(z if s is None else aten.mul.Tensor(s, z))))
    if case["hadamard"]:
        x = hadamard.reference(x)
    got = mq.int8_gate(**case)
    assert got[0].dtype == torch.int8 and got[0].shape == y.shape and got[0].is_contiguous()
    same_steps(got, x.contiguous(), case["out_scale"], case["out_zero_point"])


def test_the_gate_rotates_by_the_matrix() -> None:
    # sigmoid(256) is 1 and all products are exact; so is the rotation of integers by a matrix of order 4^k.
    y = torch.randint(-8, 8, (3, 16)).float()
    z = torch.full((3, 16), 256.0)
    q, _ = mq.int8_gate(y, 1.0, 0, z, 1.0, 0, None, True, 1024.0)
    assert torch.equal(q.double(), (y.double() * 0.25 @ hm.matrix(16)).round())


@st.composite
def norms(draw: st.DrawFn) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    n, strided = draw(st.sampled_from([1, 2, 7, 48, 130])), draw(st.booleans())
    shape = (*draw(st.sampled_from(LEADS)), n)
    x, residual = (drawn_operand(gen, shape, torch.float32, strided) for _ in range(2))
    return {
        "x": x,
        "residual": residual if draw(st.booleans()) else None,
        "weight": torch.rand(n, generator=gen) + 0.5 if draw(st.booleans()) else None,
        "eps": draw(st.sampled_from([1e-5, 1e-6])),
        "out_scale": draw(st.sampled_from([None, 0.02])),
        "out_zero_point": draw(st.sampled_from([0, -128, 31])),
    }


@settings(max_examples=80, deadline=None)
@given(norms())
def test_the_norm_is_that_of_the_graph(case: dict[str, Any]) -> None:
    x, residual = case["x"], case["residual"]
    total = x if residual is None else aten.add.Tensor(x, residual)
    normalised = aten.rms_norm.default(total, [x.shape[-1]], case["weight"], case["eps"])
    *got, given_sum = mq.int8_rms_norm(**case)
    assert got[0].dtype == torch.int8 and got[0].shape == x.shape and got[0].is_contiguous()
    same_steps((got[0], got[1]), normalised, case["out_scale"], case["out_zero_point"])
    assert given_sum.shape == (0,) if residual is None else torch.equal(given_sum, total)


@pytest.mark.parametrize("out_scale", [None, 0.1])
def test_nothing_finite_is_made_of_a_row_with_a_nan(out_scale: float | None) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = torch.nan
    for q, scale, *_ in (
        mq.int8_gate(x, 1.0, 0, x, 1.0, 0, None, False, out_scale),
        mq.int8_rms_norm(x, None, None, 1e-5, out_scale),
    ):
        if out_scale is None:
            assert scale.isnan().flatten().tolist() == [False, True]
        else:
            assert q[1, 2] == -128


@pytest.mark.parametrize("out_scale", [None, 0.1])
def test_the_operators_have_right_shape_functions(out_scale: float | None) -> None:
    y, s = torch.ones(2, 3, 8, dtype=torch.int8), torch.ones(8)
    torch.library.opcheck(mq.int8_gate.default, (y, 0.1, 1, y, 0.1, 2, s, True, out_scale, 3))
    x = torch.randn(2, 3, 8)
    torch.library.opcheck(mq.int8_rms_norm.default, (x, x.clone(), s, 1e-5, out_scale, 3))
    torch.library.opcheck(mq.int8_rms_norm.default, (x, None, None, 1e-5, out_scale, 3))


def test_bad_operands_are_refused() -> None:
    y = torch.ones(2, 12, dtype=torch.int8)
    gate = int8_gate.int8_gate.reference
    with pytest.raises(MqAoError, match="int8_gate takes z in float32 or int8, not in torch.uint8"):
        gate(y, 0.1, 0, y.to(torch.uint8), 0.1, 0, None, False)
    with pytest.raises(MqAoError, match=r"int8_gate: y_zero_point must lie in -128\.\.127"):
        gate(y, 0.1, 128, y, 0.1, 0, None, False)
    with pytest.raises(MqAoError, match="int8_gate: out_scale must be positive"):
        gate(y, 0.1, 0, y, 0.1, 0, None, False, 0.0)
    with pytest.raises(MqAoError, match="no Hadamard matrix of order 9"):
        gate(y[:, :9], 0.1, 0, y[:, :9], 0.1, 0, None, True)
    with pytest.raises(MqAoError, match=r"y and z of one shape \(..., n\)"):
        gate(y, 0.1, 0, y[:1], 0.1, 0, None, False)
    norm, x = int8_rms_norm.int8_rms_norm.reference, torch.ones(2, 12)
    with pytest.raises(MqAoError, match=r"int8_rms_norm takes float32 \(..., n\), not torch.float64"):
        norm(x.double(), None, None, 1e-5)
    with pytest.raises(MqAoError, match=r"residual must be float32 of the shape of x, \(2, 12\)"):
        norm(x, x[:1], None, 1e-5)
    with pytest.raises(MqAoError, match="weight must be a float32 vector of 12 values"):
        norm(x, None, torch.ones(11), 1e-5)
    with pytest.raises(MqAoError, match=r"int8_rms_norm: out_zero_point must lie in -128\.\.127"):
        norm(x, None, None, 1e-5, 0.1, 200)
    with pytest.raises(MqAoError, match="the last axis is empty"):
        norm(x[:, :0], None, None, 1e-5)
