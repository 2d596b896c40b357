"""Training with quantization in the loop: it begins at what quantizing gives, and it lowers the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.models import Mamba2Config, MambaLM, language_model
from mq_ao.ops import hadamard_matrix
from mq_ao.quantizer.weights import QuantizedWeight, round_to_grid
from mq_ao.training.fake_quantizers import TrainedWeight

from .conftest import VOCAB, tokens

RECIPES = ["rtn-w8a8", "mambaquant-w8a8", "mambaquant-w4a8", "mambaquant-static-w4a8", "mambaquant-w4a16"]


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


def test_without_training_it_is_what_quantizing_gives(tiny: MambaLM, calibration: list[Tensor], recipe: str) -> None:
    before = copy.deepcopy(tiny.state_dict())
    trainable = mq_ao.prepare_qat(tiny, calibration, recipe)
    quantized = mq_ao.quantize(tiny, calibration, recipe)
    converted = trainable.convert()
    ids = tokens(2, 24, seed=7)
    with torch.no_grad():
        expected = quantized.converted(ids, *tiny.initial_states(2))
        torch.testing.assert_close(converted.converted(ids, *tiny.initial_states(2)), expected, rtol=0.0, atol=0.0)
        # What is trained computes it too, in another order.
        torch.testing.assert_close(trainable(ids)[0], expected[0], rtol=1e-4, atol=1e-4)
    assert str(converted.report()) == str(quantized.report())
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_training_lowers_the_loss_of_the_program(tiny: MambaLM, calibration: list[Tensor]) -> None:
    trainable = mq_ao.prepare_qat(tiny, calibration, "mambaquant-w4a8")
    assert len(trainable.scales) >= 10 and all(parameter.requires_grad for parameter in trainable.weights)
    held_out = tokens(2, 24, seed=7)

    def distance(logits: Tensor) -> Tensor:
        return (logits - target).square().mean()

    with torch.no_grad():
        target = tiny(held_out)[0]
        before = distance(trainable(held_out)[0])
    optimizer = torch.optim.Adam([{"params": trainable.weights, "lr": 1e-4}, {"params": trainable.scales, "lr": 1e-6}])
    # Steps of constant size end in a walk over the borders between integers, which raises the loss again.
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=60)
    for step in range(60):
        ids = tokens(4, 24, seed=1000 + step)
        with torch.no_grad():
            wanted = tiny(ids)[0]
        optimizer.zero_grad()
        (trainable(ids)[0] - wanted).square().mean().backward()
        assert all(parameter.grad is not None for parameter in trainable.parameters()), "not all are trained"
        optimizer.step()
        decay.step()
    program = trainable.convert().lower()
    assert program.integer_kernels == mq_ao.quantize(tiny, calibration, "mambaquant-w4a8").lower().integer_kernels
    with torch.no_grad():
        after = distance(program(held_out)[0])
        # The program is what was trained, but for values on the border between two integers.
        assert distance(trainable(held_out)[0]) == pytest.approx(float(after), rel=0.1)
    assert after < 0.9 * before


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 16, 24]),
    rows=st.integers(1, 9),
    inputs=st.integers(1, 70),
)
def test_gradients_of_a_weight_on_its_grid(bits: int, group: int | None, rows: int, inputs: int) -> None:
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows * inputs))
    planned = round_to_grid(weight, bits, group)
    module = TrainedWeight(planned)
    given_ = weight.clone().requires_grad_()
    out = module(given_)
    assert torch.equal(out.detach(), planned.dequantized())
    assert torch.equal(module.trained(weight).values, planned.values)
    out.sum().backward()
    scale = torch.repeat_interleave(planned.scale.reshape(rows, -1), group or inputs, dim=1)[:, :inputs]
    # The identity inside the grid, and nothing where it cuts: int4 the largest weights of one sign.
    inside = torch.round(weight / scale) <= {4: 7, 8: 127}[bits]
    assert given_.grad is not None and torch.equal(given_.grad, inside.float())
    expected = torch.where(given_.grad > 0, planned.values - weight / scale, planned.values)
    share = (weight.numel() / planned.scale.numel() * {4: 7, 8: 127}[bits]) ** -0.5
    grad = module.scale.grad
    assert grad is not None
    torch.testing.assert_close(grad.sum(), expected.sum() * share, rtol=1e-3, atol=1e-4)


def test_weights_begin_where_gptq_rounds_them() -> None:
    weight = torch.tensor([[0.4, 1.6, -3.2]])
    planned = QuantizedWeight(torch.tensor([[1, 2, -3]], dtype=torch.int8), torch.tensor([1.0]))
    begun = TrainedWeight(planned).begin(weight)
    assert torch.equal(begun, torch.tensor([[1.0, 1.6, -3.2]]))  # the first alone is not at its nearest


@pytest.mark.parametrize("n", [1, 8, 12, 20, 40])
def test_gradient_of_the_rotation(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x, scale = (torch.randn(*shape, n, generator=generator, dtype=torch.float64) for shape in ((2, 3), ()))
    hadamard: Callable[..., Tensor] = torch.ops.mq_ao.hadamard
    assert torch.autograd.gradcheck(hadamard, (x.requires_grad_(),))
    assert torch.autograd.gradcheck(hadamard, (x, scale.requires_grad_()))
    torch.testing.assert_close(hadamard(x, scale), (x * scale) @ hadamard_matrix.matrix(n))


def test_what_has_no_gradient_is_refused(tiny: MambaLM, calibration: list[Tensor]) -> None:
    with pytest.raises(MqAoError, match="mq_ao.scan_states.default has no gradient: train without expose_state"):
        mq_ao.prepare_qat(tiny, calibration, "mambaquant-paper-w8a8")


def test_mamba2_is_trained(calibration: list[Tensor]) -> None:
    torch.manual_seed(0)
    shape = Mamba2Config(vocab_size=VOCAB, d_model=32, n_layer=1, headdim=16, d_state=16)
    model = language_model(shape).eval()
    trainable = mq_ao.prepare_qat(model, calibration, "rtn-w8a8")
    ids = tokens(2, 24, seed=7)
    trainable(ids)[0].square().mean().backward()
    # Through the scan: what comes before it learns.
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trainable.weights)


def test_a_weight_that_diverged_is_named(tiny: MambaLM, calibration: list[Tensor]) -> None:
    trainable = mq_ao.prepare_qat(tiny, calibration, "rtn-w8a8")
    with torch.no_grad():
        trainable.scales[0].fill_(float("nan"))
    with pytest.raises(MqAoError, match="became NaN or Inf: train with a smaller learning rate"):
        trainable.convert()
