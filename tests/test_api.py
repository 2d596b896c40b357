"""`mq_ao.quantize`: the whole walk, and every way in which its inputs can be wrong."""

from __future__ import annotations

import copy

import pytest
import torch

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import capture, compile_float
from mq_ao.capture import export
from mq_ao.models import MambaLM
from mq_ao.quantized import QuantizedModel
from mq_ao.recipes import RECIPES, Recipe, get_recipe
from tests.conftest import VOCAB, tokens


def test_quantized_logits_are_close_to_float(quantized: QuantizedModel, tiny: MambaLM) -> None:
    ids = tokens(2, 32, seed=7)
    with torch.no_grad():
        expected, got = tiny(ids)[0], quantized.converted(ids, *tiny.initial_states(2))[0]
    assert (got - expected).norm() < 0.06 * expected.norm()


def test_the_model_is_not_changed(tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    before = copy.deepcopy(tiny.state_dict())
    mq_ao.quantize(tiny, calibration)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_report_says_what_was_done(quantized: QuantizedModel) -> None:
    text = str(quantized.report())
    assert "12 nodes quantized, 4 left in float" in text
    assert "left out   scan x 2: switched off by the configuration" in text
    assert "calibrated on 4 batches" in text
    assert quantized.report().recipe.name in text


def test_calibration_may_be_a_generator_of_tuples(tiny: MambaLM) -> None:
    batches = ((tokens(2, 8, seed=seed), *tiny.initial_states(2)) for seed in range(3))
    assert mq_ao.quantize(tiny, batches).report().batches == 3


def test_capture_takes_any_batch_and_length(tiny: MambaLM) -> None:
    graph = capture(tiny, ())
    for shape in [(1, 1), (1, 5), (4, 1), (3, 17)]:
        ids, states = tokens(*shape), tiny.initial_states(shape[0])
        with torch.no_grad():
            for got, expected in zip(graph(ids, *states), tiny(ids), strict=True):
                torch.testing.assert_close(got, expected)


def test_float_program_equals_the_model(tiny: MambaLM) -> None:
    program = compile_float(tiny)
    ids = tokens(2, 21)
    torch.testing.assert_close(program(ids)[0], tiny(ids)[0].detach(), rtol=1e-4, atol=1e-5)
    assert dict(program.integer_kernels) == {}


def test_unknown_recipe_lists_the_known_ones(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="unknown recipe 'w2a2': the recipes are rtn-w8a8"):
        mq_ao.quantize(tiny, [tokens(1, 4)], "w2a2")
    assert [get_recipe(name).name for name in RECIPES] == list(RECIPES)


def test_unknown_pass_is_refused(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="unknown pass 'rotate'"):
        mq_ao.quantize(tiny, [tokens(1, 4)], Recipe("mine", passes=("rotate",)))


def test_unknown_backend_is_refused(quantized: QuantizedModel) -> None:
    with pytest.raises(MqAoError, match="unknown backend 'tpu': the backends are native"):
        quantized.lower("tpu")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration is empty"),
        (torch.zeros(2, 4, dtype=torch.int64), "calibration is one tensor"),
        (["text"], "batch 0: this is text: tokenize it first"),
        ([torch.zeros(2, 4)], "batch 0: input_ids must be .*got a tensor of shape .2, 4., torch.float32"),
        ([torch.zeros(4, dtype=torch.int64)], "input_ids must be .batch, length. int64"),
        ([torch.zeros(2, 0, dtype=torch.int64)], "batch 0: input_ids is empty"),
        (
            [torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), VOCAB)],
            "batch 1: input_ids holds 256..256",
        ),
        ([torch.full((1, 3), -1)], "outside the vocabulary of 256 tokens"),
    ],
)
def test_bad_calibration_is_refused(tiny: MambaLM, batches: object, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        mq_ao.quantize(tiny, batches)  # type: ignore[arg-type]  # bad on purpose


def test_weights_with_nan_are_named(tiny: MambaLM) -> None:
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.backbone.layers[1].mixer.D[3] = torch.nan
    with pytest.raises(MqAoError, match="weight backbone.layers.1.mixer.D holds NaN or Inf"):
        mq_ao.quantize(broken, [tokens(1, 4)])


def test_overflow_during_calibration_names_the_node(tiny: MambaLM) -> None:
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.backbone.layers[1].norm.weight.fill_(3e38)
    with pytest.raises(MqAoError, match="NaN or Inf at node .* in backbone.layers.1"):
        mq_ao.quantize(broken, [tokens(1, 4)])


def test_export_refuses_training_mode_and_empty_examples(tiny: MambaLM) -> None:
    ids = tokens(2, 4)
    with pytest.raises(MqAoError, match=r"is in training mode: call .eval\(\)"):
        export(copy.deepcopy(tiny).train(), (ids,))
    with pytest.raises(MqAoError, match="an example input is empty"):
        export(tiny, (ids[:, :0],))
    with pytest.raises(MqAoError, match="MambaLM is in training mode"):
        mq_ao.quantize(copy.deepcopy(tiny).train(), [ids])


def test_export_of_a_model_that_branches_on_data_is_a_clear_error() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(MqAoError, match="torch.export cannot capture Branching"):
        export(Branching().eval(), (torch.ones(2, 3),))
