"""Rounding for the loss: against GPTQ on the whole Hessian, fitted scales, gradients, and what it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.api import capture
from mq_ao.evaluate import compare
from mq_ao.graph import Role, edit, match, walk
from mq_ao.graph.stretches import stretches
from mq_ao.graph.views import Layer
from mq_ao.models import Mamba2Config, Mamba2LM, MambaConfig, MambaLM, demo
from mq_ao.quantizer import MambaQuantizer, QuantizationConfig, RoleSpec, Rounding, planning
from mq_ao.quantizer.feedback import compensation, damped, round_both, round_inputs
from mq_ao.quantizer.fisher import fisher, fitted_scale, loss_change
from mq_ao.quantizer.gptq import gptq
from mq_ao.quantizer.weights import round_to_grid, spread
from mq_ao.recipes import Recipe
from mq_ao.statistics import Request, collect, gradients
from mq_ao.statistics.gradients import GradientRun, gradient_names, weighted_input_name
from mq_ao.text import BYTE_VOCABULARY, ByteCodec, TokenText, byte_text, calibration_batches, read_tokens
from tests.conftest import tokens

seeds = st.integers(0, 2**31)


def moment(size: int, seed: int) -> Tensor:
    """Of mixtures of sources of unlike size, float64."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -1.5, size)
    x = (sources @ torch.randn(size, size, generator=generator)).double()
    return damped(x.T @ x / len(x), 0.01)


def weight(rows: int, inputs: int, seed: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([4, 8]), seeds)
def test_both_axes_are_gptq_of_all_weights_at_once(rows: int, inputs: int, bits: int, seed: int) -> None:
    exact, h_in, h_out = weight(rows, inputs, seed).double(), moment(inputs, seed + 1), moment(rows, seed + 2)
    scale = torch.full_like(exact, 0.3)
    found = round_both(exact, scale, compensation(h_in), compensation(h_out), bits)
    # One output whose inputs are all weights, row by row, under the Kronecker product itself.
    whole = compensation(torch.kron(h_out, h_in))
    assert torch.equal(found, round_inputs(exact.view(1, -1), scale.view(1, -1), whole, bits).view_as(exact))


@pytest.mark.parametrize(("rows", "inputs"), [(1, 300), (300, 1), (130, 260), (257, 128)])
def test_blocks_make_no_difference(rows: int, inputs: int) -> None:
    exact, scale = weight(rows, inputs, 3).double(), torch.full((rows, inputs), 0.3, dtype=torch.float64)
    h_in, h_out = compensation(moment(inputs, 4)), compensation(moment(rows, 5))
    # Blocks of rows and of columns are different code, and the problem is the same with the axes exchanged.
    found, turned = round_both(exact, scale, h_in, h_out, 4), round_both(exact.T, scale.T, h_out, h_in, 4)
    assert torch.equal(found, turned.T)
    alone = compensation(torch.eye(rows, dtype=torch.float64))
    assert torch.equal(round_both(exact, scale, h_in, alone, 4), round_inputs(exact, scale, h_in, 4))


@pytest.mark.parametrize("group_size", [None, 4, 3])
def test_scales_are_those_of_least_change(group_size: int | None) -> None:
    rows, inputs = 2, 8
    exact, h_in, h_out = weight(rows, inputs, 6).double(), moment(inputs, 7), moment(rows, 8)
    start = round_to_grid(exact, 4, group_size)
    values = start.values.double()
    found = fitted_scale(exact, values, start.scale.double(), h_in, h_out, group_size)
    # The whole least-squares problem: one column of its matrix a scale.
    count = start.scale.numel()
    columns = []
    for index in range(count):
        one = torch.zeros(count, dtype=torch.float64).scatter(0, torch.tensor([index]), 1.0).view(start.scale.shape)
        columns.append((values * spread(one, inputs, group_size)).reshape(-1))
    basis, whole = torch.stack(columns, 1), torch.kron(h_out, h_in)
    exact_scale = torch.linalg.solve(basis.T @ whole @ basis, basis.T @ whole @ exact.reshape(-1))
    assert (exact_scale > 0).all()
    # Conjugate gradients end after as many steps as there are scales, at most 6 here, but for rounding in float64.
    torch.testing.assert_close(found.reshape(-1), exact_scale, rtol=1e-9, atol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([4, 8]), st.sampled_from([None, 5, 64]), seeds)
def test_it_is_never_worse_than_rounding(rows: int, inputs: int, bits: int, group_size: int | None, seed: int) -> None:
    exact, h_in, h_out = weight(rows, inputs, seed), moment(inputs, seed + 1), moment(rows, seed + 2)
    found = fisher(exact, h_in, h_out, bits, group_size)
    rounded = round_to_grid(exact, bits, group_size, True, h_in.diagonal())
    moments = damped(h_in, 0.05), damped(h_out, 0.1)
    assert loss_change(exact, found, *moments) <= loss_change(exact, rounded, *moments)
    assert (found.bits, found.group_size, found.scale.shape) == (bits, group_size, rounded.scale.shape)
    assert int(found.values.min()) >= -(2 ** (bits - 1)) and int(found.values.max()) < 2 ** (bits - 1)


def test_related_outputs_are_made_use_of() -> None:
    exact, h_in, h_out = weight(96, 128, 9), moment(128, 10), moment(96, 11)
    ours = loss_change(exact, fisher(exact, h_in, h_out, 4, 64), h_in, h_out)
    assert ours < 0.6 * loss_change(exact, gptq(exact, h_in, 4, 64), h_in, h_out)


def test_a_layer_that_nothing_depends_on_is_rounded() -> None:
    exact = weight(5, 8, 12)
    found, rounded = fisher(exact, torch.zeros(8, 8), torch.zeros(5, 5), 4), round_to_grid(exact, 4)
    assert (found.dequantized() - exact).square().sum() < (rounded.dequantized() - exact).square().sum()


def test_bad_moments() -> None:
    with pytest.raises(MqAoError, match="give .out, in., .in, in. and .out, out."):
        fisher(weight(3, 4, 0), moment(4, 0), moment(4, 0), 4)
    with pytest.raises(MqAoError, match="NaN or Inf"):
        fisher(weight(3, 4, 0), moment(4, 0), moment(3, 0) * math.nan, 4)
    with pytest.raises(MqAoError, match="damping is -1"):
        fisher(weight(3, 4, 0), moment(4, 0), moment(3, 0), 4, input_damping=-1)


def divergence(model: MambaLM, graph: GraphModule, text: TokenText) -> float:
    """Mean KL of a captured graph to its float model."""

    def step(part: Tensor, *states: Tensor) -> Any:
        return graph(part, *(states or model.initial_states(1)))

    return compare(model, step, text).divergence


def test_gradients_tell_what_a_change_does_to_predictions(tiny: MambaLM) -> None:
    graph, ids = capture(tiny, ()), tokens(16, 33)
    batches = [(part, *tiny.initial_states(4)) for part in ids[:, :-1].split(4)]
    for node in (node for role, node in match(graph).by_role() if role in (Role.OUT_PROJ, Role.HEAD)):
        names = [weighted_input_name(node), *gradient_names(node)]
        found = collect(graph, [Request(name, covariance=True) for name in names], batches)
        h_in, h_out = (found[name].moments / found[name].count for name in names)
        changed = capture(tiny, ())
        (same,) = (other for other in changed.graph.nodes if other.name == node.name)
        matrix = edit.constant(graph, Layer.of(node).weight).double()
        change = 0.02 * matrix.abs().mean() * weight(*matrix.shape, 13).double()
        edit.set_operand(changed, same, "weight", matrix + change)
        changed.recompile()
        # Both moments count the gradients, so that their product does twice.
        predicted = 0.5 * float(((h_out @ change @ h_in) * change).sum() / h_out.trace())
        # One draw a token, and moments that are taken to be independent: half or twice is far from coincidence.
        assert 0.5 < predicted / divergence(tiny, changed, TokenText(tuple(ids), None)) < 2


def test_gradients_leave_the_model_as_it_is(tiny: MambaLM, calibration: list[Tensor]) -> None:
    graph = capture(tiny, ())
    (head,) = match(graph).heads
    request = [Request(gradient_names(head)[0], covariance=True)]
    batches = [(calibration[0], *tiny.initial_states(len(calibration[0])))]
    first, again = (collect(graph, request, batches)[request[0].node] for _ in range(2))
    assert torch.equal(first.moments, again.moments)
    assert all(parameter.grad is None for parameter in tiny.parameters())
    # Gradients of log p by logits are one less p for the drawn token and minus p for the others: they sum to nothing.
    torch.testing.assert_close(first.moments.sum(0), torch.zeros(256, dtype=torch.float64), rtol=0, atol=1e-4)


ALL_FOUR = QuantizationConfig(
    {role: RoleSpec("none", bits=4, rounding=Rounding.FISHER) for role in (Role.IN_PROJ, Role.OUT_PROJ, Role.HEAD)}
)


def test_predictions_change_less_than_with_gptq() -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=256, d_model=64, n_layer=1)).eval()
    # The head looks at few directions of the stream, so that out_proj's errors can go where it does not look.
    model.lm_head.weight.data = weight(256, 8, 1) @ weight(8, 64, 2) / 8
    ids, text = [tokens(4, 64, seed=seed) for seed in range(4)], TokenText(tuple(tokens(8, 65, seed=9)), None)
    found = []
    for rounding in (Rounding.FISHER, Rounding.GPTQ):
        scheme = QuantizationConfig({Role.OUT_PROJ: RoleSpec("none", bits=4, rounding=rounding)})
        found.append(divergence(model, mq_ao.quantize(model, ids, Recipe("four", scheme)).converted, text))
    assert found[0] < 0.8 * found[1]


def test_few_tokens_do_no_harm() -> None:
    """A trained model, since on moments of drawn Gaussian numbers little damping is best for any number of them."""
    model = MambaLM.from_pretrained("demo")
    few = calibration_batches(read_tokens(demo.CALIBRATION, BYTE_VOCABULARY, ByteCodec()), 1024)
    text = byte_text(demo.HELDOUT.read_bytes()[:8192])
    found = []
    for rounding in (Rounding.FISHER, Rounding.GPTQ):
        spec = RoleSpec("none", bits=4, group_size=128, rounding=rounding)
        scheme = QuantizationConfig(dict.fromkeys((Role.IN_PROJ, Role.OUT_PROJ), spec))
        found.append(divergence(model, mq_ao.quantize(model, few, Recipe("four", scheme)).converted, text))
    assert found[0] < 0.95 * found[1]


def test_statistics_are_asked_for() -> None:
    with pytest.raises(MqAoError, match="rounding fisher is for linears; conv1d is none"):
        MambaQuantizer().set_role("conv1d", RoleSpec(rounding=Rounding.FISHER))


def test_where_there_is_no_gradient_gptq_rounds_and_the_report_says_so(tiny: MambaLM) -> None:
    report = str(mq_ao.quantize(tiny, [tokens(2, 32)], Recipe("four", ALL_FOUR, ("expose_state",))).report())
    assert "rounded by gptq, since scan_states_default has no gradient" in report
    graph = passes.apply(capture(tiny, ()), ["expose_state"]).module
    (head,) = match(graph).heads
    with pytest.raises(MqAoError, match="has no gradient: ask for statistics of values alone"):
        collect(graph, [Request(gradient_names(head)[0])], [(tokens(2, 8), *tiny.initial_states(2))])


def test_mamba2_is_rounded_for_the_loss_too() -> None:
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config(vocab_size=256, d_model=32, n_layer=1, headdim=16, d_state=16)).eval()
    report = str(mq_ao.quantize(model, [tokens(2, 32)], Recipe("four", ALL_FOUR)).report())
    assert "fisher" in report and "rounded by gptq" not in report


def test_heads_of_large_vocabularies_are_rounded_by_gptq(tiny: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_OUTPUTS", 255)
    lines = str(mq_ao.quantize(tiny, [tokens(4, 32)], "mambaquant-w4a8").report()).splitlines()
    (head,) = [line for line in lines if line.startswith("  head")]
    assert "rounded by gptq, since it has 256 outputs, and gradients are kept of 255 at most" in head
    (out_proj,) = [line for line in lines if line.startswith("  out_proj")]
    assert "gptq" not in out_proj


def test_sequences_are_run_one_after_the_other(tiny: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, sizes = capture(tiny, ()), []
    (head,) = match(graph).heads
    run = GradientRun._forwards
    monkeypatch.setattr(
        GradientRun,
        "_forwards",
        lambda self, given: [sizes.append([len(given[0]), given[1].shape[1]]), run(self, given)][1],
    )
    names = [weighted_input_name(head), *gradient_names(head)]
    batches = [(tokens(3, 8), *tiny.initial_states(3))]
    found = collect(graph, [Request(name, covariance=True) for name in names], batches)
    assert sizes == [[1, 1]] * 3
    assert [found[name].count for name in names] == [24, 24]


def moments_of_all_linears(graph: GraphModule, batches: list[tuple[Tensor, ...]]) -> tuple[list[Tensor], int]:
    """The moments of gradients of all linears, and the most bytes that were kept for gradients at a time."""
    names = [
        name for node in walk.calls(graph, walk.LINEAR) for name in (weighted_input_name(node), *gradient_names(node))
    ]
    kept = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal kept, most
            self.tensor = tensor
            kept += tensor.nbytes
            most = max(most, kept)

        def __del__(self) -> None:
            nonlocal kept
            kept -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda one: one.tensor):
        found = collect(graph, [Request(name, covariance=True) for name in names], batches)
    return [found[name].moments for name in names], most


def test_gradients_block_by_block_are_those_of_the_whole_and_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=64, d_model=32, n_layer=6)).eval().double()
    graph = capture(model, ())
    ids = tokens(2, 24) % 64
    batches = [(ids, *(state.double() for state in model.initial_states(2)))]
    moments, kept = moments_of_all_linears(graph, batches)
    monkeypatch.setattr(gradients, "stretches", lambda graph, starts: stretches(graph, []))
    whole, all_kept = moments_of_all_linears(graph, batches)
    for one, expected in zip(moments, whole, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)
    assert kept < all_kept / 3  # six blocks, of which one is kept


def test_graphs_are_not_cut_through_several_values(tiny: MambaLM) -> None:
    graph = capture(tiny, ()).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    found = stretches(graph, calls)
    assert [node for stretch in found for node in stretch.nodes] == calls
    assert all(isinstance(walk.value(node), Tensor) for stretch in found for node in stretch.reads)
    assert len(found) > len(calls) / 2
