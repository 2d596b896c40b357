"""The int8 carried state: its scales, the q/dq simulation, the lowered program, and what is left out."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.api import capture
from mq_ao.graph import Direction, Role, match
from mq_ao.lowering import inductor
from mq_ao.lowering.inductor import InductorProgram
from mq_ao.models import MambaLM
from mq_ao.models.generate import Step
from mq_ao.ops.state import quantize_state
from mq_ao.passes import Statistics, collect
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer import Activation, MambaQuantizer, QuantizationConfig, RoleSpec
from mq_ao.recipe_files import from_dict, to_dict
from mq_ao.recipes import Recipe, get_recipe
from mq_ao.statistics.probe import flat_states_name
from tests.conftest import tokens

# A value on the boundary of two integers may round either way when the float work around it is fused differently.
FLIPPED_STEP = 5e-3
STATE_ALONE = QuantizationConfig({Role.CARRIED_STATE: RoleSpec()})


def with_state(name: str) -> Recipe:
    recipe = get_recipe(name)
    return replace(recipe, scheme=recipe.scheme.replaced(carried_state=RoleSpec()))


@pytest.fixture(scope="module")
def carried(tiny: MambaLM, calibration: list[torch.Tensor]) -> QuantizedModel:
    """The calibration can be read only once."""
    return mq_ao.quantize(tiny, iter(calibration), with_state("rtn-scan-w8a8"))


@pytest.fixture(scope="module")
def compiled(carried: QuantizedModel) -> InductorProgram:
    return carried.lower("inductor")


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def rounded(graph: GraphModule, state: torch.Tensor) -> torch.Tensor:
    """The integers of a state that the simulation gave."""
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.mq_ao.dequantize_state.default)
    # One where each of the two states enters, and one where it leaves.
    first, _, second, _ = (getattr(graph, node.args[1].target) for node in nodes)
    return torch.stack([quantize_state(part, scale) for part, scale in zip(state, (first, second), strict=True)]).int()


def scans(tiny: MambaLM) -> tuple[GraphModule, list[Direction]]:
    graph = capture(tiny, ())
    return graph, list(match(graph).directions)


def converted(tiny: MambaLM, statistics: Statistics, quantizer: MambaQuantizer) -> GraphModule:
    prepared = prepare_pt2e(capture(tiny, ()), quantizer.set_statistics(statistics))
    return convert_pt2e(prepared)


@pytest.fixture(scope="module")
def statistics(tiny: MambaLM, calibration: list[torch.Tensor]) -> Statistics:
    graph = capture(tiny, ())
    requests = MambaQuantizer().set_global(STATE_ALONE).requests(graph)
    return collect(graph, requests, [(ids, *tiny.initial_states(2)) for ids in calibration])


def test_statistics_are_those_of_every_state_after_every_token(
    tiny: MambaLM, calibration: list[torch.Tensor], statistics: Statistics
) -> None:
    graph, directions = scans(tiny)
    assert set(statistics) == {flat_states_name(direction.scan) for direction in directions}
    largest = torch.zeros(2, 128, 16)
    with torch.no_grad():
        for ids in calibration:
            for length in range(1, ids.shape[1] + 1):
                _, _, state = graph(ids[:, :length], *tiny.initial_states(2))
                largest = torch.maximum(largest, state.abs().amax(1))
    for expected, direction in zip(largest, directions, strict=True):
        found = statistics[flat_states_name(direction.scan)]
        assert found.count == 4 * 2 * 32
        # The scan and `scan_states` each compute h in float32, with exponentials of their own.
        torch.testing.assert_close(found.maximum.float().view(128, 16), expected, rtol=1e-5, atol=1e-9)


def test_the_state_alone_changes_by_a_step_and_outputs_hardly(tiny: MambaLM, statistics: Statistics) -> None:
    quantizer = MambaQuantizer().set_global(STATE_ALONE)
    graph = converted(tiny, statistics, quantizer)
    assert [(item.role, item.accepted) for item in quantizer.report.decisions if item.role is Role.CARRIED_STATE] == [
        (Role.CARRIED_STATE, True)
    ] * 2
    ids = tokens(2, 24)
    with torch.no_grad():
        zeros = tiny.initial_states(2)
        logits, conv, state = tiny(ids[:, :12], *zeros)
        got_logits, _, got_state = graph(ids[:, :12], *zeros)
        later, _, _ = tiny(ids[:, 12:], conv, state)
        got_later, _, _ = graph(ids[:, 12:], conv, state)
    # Nothing is rounded before the first state leaves.
    torch.testing.assert_close(got_logits, logits, rtol=1e-6, atol=1e-6)
    for index, direction in enumerate(scans(tiny)[1]):
        scale = (2 * statistics[flat_states_name(direction.scan)].maximum / 127).float().view(128, 16)
        # A step, but for states outside twice the calibrated range, which saturate, and float32 rounding.
        kept = state[index].clamp(-127 * scale, 127 * scale)
        assert ((got_state[index] - kept).abs() <= 1.0001 * scale).all()
    # Errors below 2/127 of each state's largest magnitude: a few percent of a typical state, and a part of the logits.
    difference = (got_later - later).norm() / later.norm()
    assert 0 < difference < 0.04


def test_a_state_is_rounded_up_as_often_as_its_fraction_says() -> None:
    """Values around 41.3 steps, as they come in a row of tokens: on average nothing is lost."""
    h = 41.3 + 0.05 * torch.randn(1, 1000, 100, generator=torch.Generator().manual_seed(0))
    q = quantize_state(h, torch.ones(1000, 100))
    assert set(q.unique().tolist()) == {41, 42}
    # 100,000 values of standard deviation 0.46: 0.01 is seven standard errors.
    assert q.float().mean() == pytest.approx(h.mean().item(), abs=0.01)


def test_a_state_that_decays_slowly_reaches_zero_as_it_does_in_float() -> None:
    """A hundredth is lost with every token, half a step at 50 steps: rounded to the nearest it would stay there."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(100, 16)
    exact = nearest = torch.full((1, 100, 16), 100.0)
    dithered = quantize_state(exact, scale)
    for _ in range(400):
        # Step sizes differ from token to token.
        decay = 1 - 0.02 * torch.rand(1, 100, 16, generator=generator)
        exact, nearest = decay * exact, (decay * nearest).round()
        dithered = quantize_state(decay * dithered, scale)
    assert exact.mean() < 2 and nearest.mean() > 20
    assert dithered.float().mean() == pytest.approx(exact.mean().item(), abs=0.5)


def test_a_state_that_is_always_zero_stays_zero(tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        # Rows of x_proj: dt's low rank, then B.
        model.backbone.layers[0].mixer.x_proj.weight[model.config.rank] = 0
    graph = mq_ao.quantize(model, calibration, Recipe("state", STATE_ALONE)).converted
    ids, states = tokens(1, 8), tiny.initial_states(1)
    with torch.no_grad():
        logits, conv, state = graph(ids, *states)
        again, _, _ = graph(ids, conv, state)
    assert not state[0, :, :, 0].any() and state[0, :, :, 1].any()
    assert logits.isfinite().all() and again.isfinite().all()


def check_steps(step: Step, simulation: GraphModule, tiny: MambaLM) -> None:
    """Checks a prompt and single tokens after it, each with the states that came before."""
    ids, (conv, state), before = tokens(2, 14), tiny.initial_states(2), (None, None)
    for part in ids.split([9, 1, 1, 1, 1, 1], dim=1):
        with torch.no_grad():
            expected, conv, state = simulation(part, conv, state)
            logits, *before = step(part, *before)
        assert relative(logits, expected) < FLIPPED_STEP
        assert relative(before[0], conv) < FLIPPED_STEP
        assert before[1].dtype == torch.int8
        # Few states are off, and those by a step or two.
        wrong = (before[1].int() - rounded(simulation, state)).abs()
        assert wrong.max() <= 2 and wrong.float().mean() < 0.01


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-scan-w8a8"])
def test_integer_graph_equals_the_simulation(recipe: str, tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    simulation = mq_ao.quantize(tiny, calibration, with_state(recipe)).converted
    integer = inductor.rewrite(simulation)
    assert integer.kernels["mq_ao.qselective_scan.default"] == 2
    assert integer.simulated == []
    zeros = torch.zeros(2, 2, 3, 128), torch.zeros(2, 2, 128, 16, dtype=torch.int8)

    def step(ids: torch.Tensor, *states: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return integer.module(ids, *(zeros if states[0] is None else states))

    check_steps(step, simulation, tiny)


def test_compiled_program_equals_the_simulation(
    compiled: InductorProgram, carried: QuantizedModel, tiny: MambaLM
) -> None:
    check_steps(compiled, carried.converted, tiny)
    ids = tokens(2, 7)
    logits, conv, state = compiled(ids)
    last, conv_end, state_end = compiled.prefill(ids)
    torch.testing.assert_close(last, logits[:, -1:], rtol=0, atol=1e-5)
    assert torch.equal(conv_end, conv) and torch.equal(state_end, state)


def test_state_is_four_times_smaller_and_rounded_only_between_calls(compiled: InductorProgram, tiny: MambaLM) -> None:
    ids = tokens(3, 6)
    whole, conv, state = compiled(ids)
    assert conv.dtype == torch.float32
    assert state.shape == (2, 3, 128, 16) and state.nbytes * 4 == tiny.initial_states(3)[1].nbytes
    assert state.abs().max() > 32
    zeros = torch.zeros_like(state)
    torch.testing.assert_close(compiled(ids, torch.zeros_like(conv), zeros)[0], whole, rtol=0, atol=0)
    assert compiled.generate(ids, 3).shape == (3, 9)


def test_a_saved_program_has_the_same_states(compiled: InductorProgram, tmp_path: Path) -> None:
    compiled.save(tmp_path / "tiny.pt2")
    loaded, ids = mq_ao.load(tmp_path / "tiny.pt2"), tokens(2, 5)
    for got, expected in zip(loaded(ids), compiled(ids), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(loaded.generate(ids, 3), compiled.generate(ids, 3))


def test_states_of_another_type_are_refused(compiled: InductorProgram) -> None:
    ids = tokens(1, 4)
    _, conv, state = compiled(ids)
    with pytest.raises(MqAoError, match="ssm_state is torch.float32, but this program carries torch.int8"):
        compiled.decode(ids[:, :1], conv, state.float())
    with pytest.raises(MqAoError, match="conv_state is torch.float64, but this program carries torch.float32"):
        compiled(ids, conv.double(), state)


def test_without_statistics_it_says_what_to_do(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="needs statistics of the states of selective_scan: collect the quantizer's"):
        prepare_pt2e(capture(tiny, ()), MambaQuantizer().set_role("carried_state", RoleSpec()))


@pytest.mark.parametrize("spec", [RoleSpec(Activation.NONE), RoleSpec(Activation.PER_TOKEN), RoleSpec(bits=4)])
def test_only_static_int8_is_taken(spec: RoleSpec) -> None:
    with pytest.raises(MqAoError, match="no (integer )?kernel for carried_state with"):
        MambaQuantizer().set_role("carried_state", spec)


def left_out(graph: GraphModule, quantizer: MambaQuantizer) -> set[str]:
    """Reasons for which no carried state of the graph is quantized; none may be."""
    prepare_pt2e(graph, quantizer)
    decisions = [item for item in quantizer.report.decisions if item.role is Role.CARRIED_STATE]
    assert decisions and not any(item.accepted for item in decisions)
    return {item.detail for item in decisions}


def test_states_that_share_an_input_are_quantized_together_or_not_at_all(tiny: MambaLM) -> None:
    quantizer = MambaQuantizer().set_global(STATE_ALONE).set_module_name("backbone.layers.1", None)
    reasons = left_out(capture(tiny, ()), quantizer)
    assert reasons == {"selective_scan_1 reads the graph input ssm_state in float"}


def test_states_that_do_not_pass_through_the_graph_are_left_out(tiny: MambaLM) -> None:
    class Stateless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = tiny

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm(ids)[0]

    graph = mq_ao.export(Stateless().eval(), (tokens(2, 5),)).module(check_guards=False)
    quantizer = MambaQuantizer().set_global(STATE_ALONE)
    assert quantizer.requests(graph) == []
    assert left_out(graph, quantizer) == {"its initial state is not an input of the graph"}
    exposed = passes.apply(capture(tiny, ()), ["expose_state"]).module
    reasons = left_out(exposed, MambaQuantizer().set_global(STATE_ALONE))
    assert reasons == {"its states are nodes of their own, which are computed in float"}


def test_operators_refuse_what_does_not_fit() -> None:
    h, scale = torch.tensor([[[0.6, -9.0, torch.nan]]]), torch.tensor([[0.1, 0.01, 1.0]])
    q = torch.ops.mq_ao.quantize_state(h, scale)
    assert q.dtype == torch.int8 and q.tolist() == [[[6, -127, 0]]]
    torch.testing.assert_close(torch.ops.mq_ao.dequantize_state(q, scale), torch.tensor([[[0.6, -1.27, 0.0]]]))
    with pytest.raises(MqAoError, match=r"a scale .channels, d_state.; they are .1, 1, 3. and .2, 3."):
        torch.ops.mq_ao.quantize_state(h, torch.ones(2, 3))
    with pytest.raises(MqAoError, match="h must be floating point, it is torch.int8"):
        torch.ops.mq_ao.quantize_state(q, scale)
    with pytest.raises(MqAoError, match="q must be int8, it is torch.float32"):
        torch.ops.mq_ao.dequantize_state(h, scale)


def test_recipes_say_it_and_files_keep_it() -> None:
    recipe = with_state("rtn-w8a8")
    assert "carried_state static int8, one scale a channel and state" in str(recipe)
    assert from_dict(to_dict(recipe)) == recipe
