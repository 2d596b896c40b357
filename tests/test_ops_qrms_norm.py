"""`mq_ao::qrms_norm` and `quantize_per_tensor`: what they stand for, node by node, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from mq_ao import MqAoError
from mq_ao.ops import qrms_norm
from tests.conftest import assert_same_bits_for_any_threads
from tests.test_int8_rows import norms

pytestmark = pytest.mark.usefixtures("native_kernels")
mq, qd = torch.ops.mq_ao, torch.ops.quantized_decomposed


def exact(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum in float32, as the operator rounds it, and its norm in float64."""
    total = case["x"] if case["residual"] is None else case["x"] + case["residual"]
    weight = None if case["weight"] is None else case["weight"].double()
    return total, torch.nn.functional.rms_norm(total.double(), (total.shape[-1],), weight, case["eps"])


@settings(max_examples=120, deadline=None)
@given(norms())
def test_the_norm_is_that_of_the_graph(case: dict[str, Any]) -> None:
    case["out_zero_point"] %= 256
    total, norm = exact(case)
    for q, scale, given_sum in (mq.qrms_norm(**case), qrms_norm.qrms_norm.reference(**case)):
        assert q.dtype == torch.uint8 and q.shape == total.shape and q.is_contiguous()
        assert given_sum.shape == (0,) if case["residual"] is None else torch.equal(given_sum, total)
        if case["out_scale"] is None:
            steps = norm / scale.double() + 128
            # A dozen roundings of 2^-24 each of the largest value, which is 127 steps.
            assert (
                (scale.double() * 127 - norm.abs().amax(-1, keepdim=True)).abs().le(2e-6 * 127 * scale.double()).all()
            )
        else:
            assert scale.shape == (0,)
            steps = norm / case["out_scale"] + case["out_zero_point"]
        # Half a step, and what those roundings move: |norm| is below sqrt(130) times 1.5, which is 855 steps of 0.02.
        assert ((q.double() - steps.clamp(0, 255)).abs() <= 0.5 + 855 * 2e-6).all()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([(), (1,), (0, 3), (7,), (3, 5), (2, 3, 33), (1, 4, 0)]),
    st.booleans(),
    st.sampled_from([0.01, 1.7]),
    st.integers(0, 255),
    st.integers(0, 2**20),
)
def test_quantize_per_tensor_is_pytorchs(
    shape: tuple[int, ...], strided: bool, scale: float, zero_point: int, seed: int
) -> None:
    x = torch.randn((*shape, 2) if strided else shape, generator=torch.Generator().manual_seed(seed)) * 4
    x = x[..., 0] if strided else x
    assert_quantized(x, scale, zero_point)


@pytest.mark.parametrize("shape", [(1, 5, 4, 6), (3, 5, 4, 6), (2, 3, 1, 8)])
def test_parts_of_wider_rows_are_quantized_alike(shape: tuple[int, ...]) -> None:
    *batch, heads, size = shape
    wide = torch.randn(*batch, heads * size + 7, generator=torch.Generator().manual_seed(0))
    part = wide[..., 3 : 3 + heads * size].unflatten(-1, (heads, size))
    for x in (part, part.transpose(-1, -2), part[..., :2], wide.expand(2, *wide.shape)):
        assert_quantized(x, 0.02, 100)


def assert_quantized(x: Tensor, scale: float, zero_point: int) -> None:
    q = mq.quantize_per_tensor(x, scale, zero_point)
    assert q.is_contiguous()
    assert torch.equal(q, qd.quantize_per_tensor(x, scale, zero_point, 0, 255, torch.uint8))


def test_the_same_bits_for_any_threads() -> None:
    gen = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(300, 96, generator=gen) for _ in range(2))
    assert_same_bits_for_any_threads(lambda: mq.qrms_norm(x, residual, None, 1e-5))


def test_infinities_and_nan_are_seen_later() -> None:
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 20)
        x[1, 3] = value
        _, scale, _ = mq.qrms_norm(x, None, None, 1e-5)
        assert scale[0].isfinite() and scale[1].isnan()
        assert mq.quantize_per_tensor(torch.tensor([float("nan")]), 0.1, 3).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mq.qrms_norm(torch.zeros(2, 3).double(), None, None, 1e-5), r"qrms_norm takes float32 \(..., n\)"),
        (lambda: mq.qrms_norm(torch.zeros(2, 0), None, None, 1e-5), "at least one value in a row"),
        (lambda: mq.qrms_norm(torch.zeros(2, 3), torch.zeros(3, 2), None, 1e-5), "residual must be float32"),
        (lambda: mq.qrms_norm(torch.zeros(2, 3), None, torch.zeros(2), 1e-5), "a float32 vector of 3 values"),
        (lambda: mq.qrms_norm(torch.zeros(2, 3), None, None, 1e-5, 0.1, 256), "must lie in 0..255"),
        (lambda: mq.qrms_norm(torch.zeros(2, 3), None, None, 1e-5, 0.0, 0), "out_scale must be positive"),
        (lambda: mq.quantize_per_tensor(torch.zeros(2).double(), 0.1, 0), "takes float32, not torch.float64"),
        (lambda: mq.quantize_per_tensor(torch.zeros(2), -0.1, 0), "out_scale must be positive"),
        (lambda: mq.quantize_per_tensor(torch.zeros(2), 0.1, -1), "must lie in 0..255"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        call()
