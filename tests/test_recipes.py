"""Recipes: named ones run in integers and equal their simulation, and files of the examples say what they should."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mq_ao
from mq_ao import MqAoError
from mq_ao.graph import Role
from mq_ao.lowering import inductor
from mq_ao.models import MambaLM
from mq_ao.passes import Status
from mq_ao.quantizer import Activation, QuantizationConfig, RoleSpec, Rounding
from mq_ao.recipe_files import read_recipe
from mq_ao.recipes import RECIPES, Recipe
from tests.conftest import tokens

# Values on the boundary of two integers round either way where float work around them is done in another order, and
# the tiny random model carries a flipped step on. A wrong scale or layout gives errors of order one.
FLIPPED_STEPS = 2e-2


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_in_integers_and_equals_its_simulation(name: str, tiny: MambaLM) -> None:
    # Rounding for the loss relates the gradients of 256 outputs, of which the 256 tokens of the fixture say too little.
    quantized = mq_ao.quantize(tiny, [tokens(8, 64, seed=seed) for seed in range(100, 108)], name)
    integer = inductor.rewrite(quantized.converted)
    # 10 products of linears with in_proj in halves, and the head.
    assert sum(count for kernel, count in integer.kernels.items() if "linear" in kernel) == 11
    if "paper" in name:
        assert all(node.startswith("mul") for node in integer.simulated) and len(integer.simulated) == 2
    else:
        assert integer.simulated == []
    # R2 is part of the gate's operator; R4 is a node of its own.
    rotated = sum(item.name == "rotate_state" for item in RECIPES[name].passes)
    hadamards = integer.module.graph.find_nodes(op="call_function", target=torch.ops.mq_ao.hadamard.default)
    assert len(hadamards) == 2 * rotated
    ids, states = tokens(2, 19), tiny.initial_states(2)
    with torch.no_grad():
        for got, expected in zip(integer.module(ids, *states), quantized.converted(ids, *states), strict=True):
            assert float((got - expected).norm() / expected.norm()) < FLIPPED_STEPS
        drift = quantized.converted(ids, *states)[0] - tiny(ids)[0]
    # On random weights. A step of 3 bits, and of 4-bit activations beside that of 4-bit weights, is twice as wide.
    assert float(drift.norm() / tiny(ids)[0].norm()) < (0.4 if "w3" in name or "a4" in name else 0.2)
    left_out = [item for item in quantized.report().transforms if item.status is Status.LEFT_OUT]
    assert left_out == []


def test_four_bit_weights_are_four_bits(tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    eight, four = (
        inductor.rewrite(mq_ao.quantize(tiny, calibration, name).converted).module
        for name in ("mambaquant-w8a8", "mambaquant-w4a8")
    )

    def packed(module: torch.fx.GraphModule) -> int:
        return sum(value.nbytes for name, value in module.named_buffers() if "packed" in name)

    # in_proj, out_proj and head are halved; x_proj, dt_proj and the sums that zero points need are not.
    assert packed(four) < 0.75 * packed(eight)


def test_three_bit_weights_are_held_in_four(tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    four, three = (mq_ao.quantize(tiny, calibration, name) for name in ("rtn-w4a16", "rtn-w3a16"))
    assert "int3 weight in groups of 64, float input; weights are held in 4 bits" in str(three.report())
    modules = [inductor.rewrite(item.converted).module for item in (four, three)]
    sizes = [{name: value.nbytes for name, value in module.named_buffers()} for module in modules]
    assert sizes[0] == sizes[1]
    limits = {
        node.args[5:7] for node in three.converted.graph.nodes if node.target == torch.ops.torchao.dequantize_affine
    }
    assert limits == {(-4, 3)}


def test_executorch_refuses_weights_of_three_bits() -> None:
    from mq_ao.quantizer import MambaQuantizer

    with pytest.raises(MqAoError, match="'executorch' has no kernel for head with int3 weight: it takes 8 or 4 bits"):
        MambaQuantizer("executorch").set_role(Role.HEAD, RoleSpec(bits=3))


def test_the_file_without_r2_is_the_production_recipe_but_for_it() -> None:
    """The difference of their times is taken for R2's."""
    production = RECIPES["mambaquant-w8a8"]
    written = read_recipe(Path(__file__).parents[1] / "examples" / "mambaquant-w8a8-without-r2.yaml")
    assert written.name == "without-r2"
    assert written.scheme == production.scheme
    assert written.passes == tuple(item for item in production.passes if item.name != "rotate_out_proj")
    assert len(written.passes) == len(production.passes) - 1


def test_the_file_with_gates_is_the_production_recipe_but_for_them() -> None:
    production = RECIPES["mambaquant-w8a8"]
    written = read_recipe(Path(__file__).parents[1] / "examples" / "mambaquant-w8a8-gate.yaml")
    assert written.passes == production.passes
    assert written.scheme == production.scheme.replaced(gate=RoleSpec()) != production.scheme


def test_the_file_with_gptq_is_the_production_recipe_but_for_rounding_and_balance() -> None:
    production = RECIPES["mambaquant-w4a8"]
    written = read_recipe(Path(__file__).parents[1] / "examples" / "mambaquant-w4a8-gptq.yaml")
    assert [item.name for item in written.passes] == [item.name for item in production.passes]
    assert written.passes == RECIPES["mambaquant-w8a8"].passes
    fisher = {role: spec for role, spec in production.scheme.roles.items() if spec.rounding is Rounding.FISHER}
    gptq = {str(role): replace(spec, rounding=Rounding.GPTQ) for role, spec in fisher.items()}
    assert len(gptq) == 4
    assert written.scheme == production.scheme.replaced(**gptq)


def test_a_recipe_prints_as_a_table() -> None:
    text = str(RECIPES["mambaquant-w4a8"])
    assert text.startswith("recipe mambaquant-w4a8\npasses     fold_norm\n")
    assert "smooth_gate (S2) alpha=0.25 size=power" in text
    assert "smooth_state (S4) partner=input" in text
    assert "in_proj    int4 weight in groups of 64 (fisher), int8 per token input" in text
    assert "scan       static 8-bit (histogram) input" in text


@pytest.mark.parametrize("name", ["mambaquant-w8a8", "mambaquant-w4a8", "mambaquant-paper-w8a8", "quarot-w4a8"])
def test_dead_and_constant_channels_are_quantized(name: str, tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        mixer = model.backbone.layers[0].mixer
        mixer.in_proj.weight[5] = 0  # convolution's input is 0, what the scan reads a constant
        mixer.in_proj.weight[-2:] = 0  # the gate is closed
        mixer.x_proj.weight[:2] = 0  # of dt's low rank
        mixer.x_proj.weight[-1] = 0  # of C
        mixer.out_proj.weight[:, 3] = 0
        model.backbone.layers[1].norm.weight[2] = 0
    converted = mq_ao.quantize(model, calibration, name).converted
    ids = tokens(2, 19)
    with torch.no_grad():
        expected, got = model(ids)[0], converted(ids, *model.initial_states(2))[0]
    # Like the other recipes on random weights: far below what a scale of 0 or infinity would do.
    assert float((got - expected).norm() / expected.norm()) < 0.2


def test_gptq_needs_statistics_and_groups_that_do_not_divide_are_reported(
    tiny: MambaLM, calibration: list[torch.Tensor]
) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    from mq_ao.api import capture
    from mq_ao.quantizer import MambaQuantizer

    gptq = RoleSpec(bits=4, rounding=Rounding.GPTQ)
    with pytest.raises(MqAoError, match="gptq rounding needs statistics for linear"):
        prepare_pt2e(capture(tiny, ()), MambaQuantizer().set_role(Role.IN_PROJ, gptq))
    scheme = QuantizationConfig({Role.IN_PROJ: RoleSpec(bits=4, group_size=48), Role.OUT_PROJ: RoleSpec()})
    report = mq_ao.quantize(tiny, calibration, Recipe("groups", scheme)).report()
    assert "per channel, since 64 inputs are no multiple of 48" in str(report)


def test_kernels_that_do_not_exist_are_refused() -> None:
    from mq_ao.quantizer import MambaQuantizer

    with pytest.raises(MqAoError, match="no kernel for conv1d with int4 weight"):
        MambaQuantizer().set_role(Role.CONV1D, RoleSpec(bits=4))
    with pytest.raises(MqAoError, match="rounding gptq is for linears; embedding is none"):
        MambaQuantizer().set_role(Role.EMBEDDING, RoleSpec(Activation.NONE, rounding=Rounding.GPTQ))


def test_planted_outliers_break_plain_rounding_and_not_mambaquant() -> None:
    """On the bundled model and its own text: the purpose of it all."""
    from mq_ao.models import demo
    from mq_ao.passes.plant_outliers import PlantOutliers

    model = MambaLM.from_pretrained("demo")
    text = torch.tensor(list(demo.CALIBRATION.read_bytes()))
    batches = text[: 8 * 512].view(8, 512).split(2)
    ids = text[-4 * 256 :].view(4, 256)
    states = model.initial_states(4)

    def divergence(name: str) -> float:
        recipe = RECIPES[name]
        planted = Recipe("planted", recipe.scheme, (PlantOutliers(100), *recipe.passes))
        with torch.no_grad():
            log_q = mq_ao.quantize(model, batches, planted).converted(ids, *states)[0].log_softmax(-1)
            log_p = model(ids)[0].log_softmax(-1)
        return float(torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)) / 256

    rtn, quarot, ours = map(divergence, ("rtn-w8a8", "quarot-w8a8", "mambaquant-w8a8"))
    assert rtn > 0.5 and quarot > 0.1
    assert ours < 0.01
    assert quarot - ours > 0.7 * quarot
