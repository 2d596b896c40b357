"""`mq_ao::qgated_norm`: what it stands for, what it refuses, and where native programs have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.models import Mamba2Config, language_model
from mq_ao.ops import hadamard_matrix, qgated_norm
from tests.conftest import VOCAB, assert_same_bits_for_any_threads, tokens

pytestmark = pytest.mark.usefixtures("native_kernels")
mq = torch.ops.mq_ao


@st.composite
def gated_norms(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of drawn sizes, dense or parts of wider ones."""
    n = draw(st.sampled_from([1, 3, 16, 20, 33, 96, 128, 192]))
    shape = draw(st.sampled_from([(1,), (5,), (2, 3), (1, 17), (0, 4)]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    wide = draw(st.integers(0, 9))
    y, z = (3 * torch.randn(*shape, n + wide, generator=gen)[..., wide:] for _ in range(2))
    orders = [False, True] if n in (1, 16, 20, 96, 128, 192) else [False]
    return {
        "y": y,
        "z": z,
        "weight": draw(st.sampled_from([None, torch.rand(n, generator=gen) + 0.5])),
        "eps": draw(st.sampled_from([1e-5, 0.1])),
        "hadamard": draw(st.sampled_from(orders)),
        "out_scale": draw(st.sampled_from([None, 0.02])),
        "out_zero_point": draw(st.integers(0, 255)),
    }


def exact(case: dict[str, Any]) -> Tensor:
    """In float64."""
    y, z = case["y"].double(), case["z"].double()
    n = y.shape[-1]
    weight = None if case["weight"] is None else case["weight"].double()
    x = torch.nn.functional.rms_norm(y * z * torch.sigmoid(z), (n,), weight, case["eps"])
    return x @ hadamard_matrix.matrix(n) if case["hadamard"] else x


@settings(max_examples=150, deadline=None)
@given(gated_norms())
def test_it_is_gate_norm_rotation_and_quantization(case: dict[str, Any]) -> None:
    wanted = exact(case)
    largest = case["y"].shape[-1] ** 0.5 * 1.5  # of a row's norm, and so of each value, rotated or not
    for q, scale in (mq.qgated_norm(**case), qgated_norm.qgated_norm.reference(**case)):
        assert q.dtype == torch.uint8 and q.shape == wanted.shape and q.is_contiguous()
        if case["out_scale"] is None:
            assert scale.shape == (*wanted.shape[:-1], 1)
            error = (scale.double() * 127 - wanted.abs().amax(-1, keepdim=True)).abs()
            # Some twenty roundings of 2^-24 each, before the rotation and in it.
            assert (error <= 2e-6 * largest).all()
            steps, step = wanted / scale.double() + 128, scale.double()
        else:
            assert scale.shape == (0,)
            steps, step = wanted / case["out_scale"] + case["out_zero_point"], torch.tensor(0.02).double()
        # Half a step, and what those roundings move.
        assert ((q.double() - steps.clamp(0, 255)).abs() <= 0.5 + 2e-6 * largest / step).all()


def test_opcheck() -> None:
    y, z, weight = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.rand(16)
    torch.library.opcheck(mq.qgated_norm.default, (y, z, weight, 1e-5, True, 0.1, 3))
    torch.library.opcheck(mq.qgated_norm.default, (y, z, None, 1e-5, False))


def test_the_same_bits_for_any_threads() -> None:
    gen = torch.Generator().manual_seed(0)
    y, z = (torch.randn(300, 96, generator=gen) for _ in range(2))
    assert_same_bits_for_any_threads(lambda: mq.qgated_norm(y, z, None, 1e-5, True))


def test_infinities_and_nan_are_seen_later() -> None:
    for value in (float("nan"), float("inf")):
        y = torch.ones(2, 16)
        y[1, 3] = value
        _, scale = mq.qgated_norm(y, torch.ones(2, 16), None, 1e-5, True)
        assert scale[0].isfinite() and scale[1].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 16).double()}, "takes float32 y and z of one shape"),
        ({"z": torch.zeros(3, 16)}, "takes float32 y and z of one shape"),
        ({"y": torch.zeros(2, 0), "z": torch.zeros(2, 0)}, "at least one value in a row"),
        ({"weight": torch.zeros(2)}, "a float32 vector of 16 values"),
        ({"y": torch.zeros(2, 33), "z": torch.zeros(2, 33), "hadamard": True}, "33"),
        ({"out_scale": 0.0}, "out_scale must be positive"),
        ({"out_scale": 0.1, "out_zero_point": 256}, r"must lie in 0\.\.255"),
    ],
)
def test_bad_operands_are_refused(change: dict[str, Any], message: str) -> None:
    case = {"y": torch.zeros(2, 16), "z": torch.zeros(2, 16), "weight": None, "eps": 1e-5, "hadamard": False}
    for call in (mq.qgated_norm, qgated_norm.qgated_norm.reference):
        with pytest.raises(MqAoError, match=message):
            call(**case, **change) if not change.keys() & case.keys() else call(**{**case, **change})


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w8a8-dynamic", "mambaquant-w8a8"])
def test_native_programs_of_mamba2_have_it(recipe: str) -> None:
    torch.manual_seed(0)
    model = language_model(Mamba2Config(vocab_size=VOCAB, d_model=64, n_layer=2, d_state=16, headdim=16)).eval()
    quantized = mq_ao.quantize(model, [tokens(2, 32, seed=seed) for seed in (1, 2)], recipe)
    program = quantized.lower("native")
    assert program.integer_kernels["mq_ao.qgated_norm.default"] == 2
    for shape in ((2, 1), (1, 19)):
        ids = tokens(*shape)
        with torch.no_grad():
            expected = quantized.converted(ids, *model.initial_states(len(ids)))
        for value, wanted in zip(program(ids), expected, strict=True):
            # A value on the boundary of two integers may round either way: one step of one activation.
            assert (value - wanted).norm() / wanted.norm() < 5e-3
