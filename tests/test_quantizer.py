"""MambaQuantizer: what it annotates, counted in the graphs before and after conversion, and what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import capture
from mq_ao.graph import Role, walk
from mq_ao.models import MambaLM
from mq_ao.quantizer import Activation, MambaQuantizer, QuantizationConfig, Range, RoleSpec, w8a8
from tests.conftest import tokens

qd = torch.ops.quantized_decomposed


def run(model: MambaLM, quantizer: MambaQuantizer) -> GraphModule:
    prepared = prepare_pt2e(capture(model, ()), quantizer)
    with torch.no_grad():
        prepared(tokens(2, 16), *model.initial_states(2))
    return convert_pt2e(prepared)


def names(module: GraphModule) -> list[str]:
    """Operator names in graph order, without namespace and overload."""
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [str(target).split(".")[1] for target in targets if "." in str(target)]


def counts(module: GraphModule) -> Counter[str]:
    return Counter(names(module))


def test_static_w8a8_puts_a_pair_around_every_role(tiny: MambaLM) -> None:
    quantizer = MambaQuantizer().set_global(w8a8())
    ops = counts(run(tiny, quantizer))
    # Inputs of in_proj, conv1d, x_proj, dt_proj, out_proj in two blocks, and of the head.
    assert ops["quantize_per_tensor"] == 5 * 2 + 1
    # Those, plus the embedding: weights are folded, so that no quantize of a weight is left.
    assert ops["dequantize_per_channel"] == 5 * 2 + 2
    assert ops["quantize_per_channel"] == 0
    assert len(quantizer.report.accepted) == 12
    assert {decision.role for decision in quantizer.report.rejected} == {Role.SCAN, Role.GATE}


def test_order_of_a_block_is_kept(tiny: MambaLM) -> None:
    converted = run(tiny, MambaQuantizer().set_global(w8a8()))
    wanted = ("linear", "causal_conv1d", "linear", "linear", "selective_scan", "linear")
    found = [name for name in names(converted) if name in wanted]
    assert found[:6] == list(wanted)
    # Every linear and convolution reads dequantized values.
    for node in converted.graph.nodes:
        if node.target in (torch.ops.aten.linear.default, torch.ops.mq_ao.causal_conv1d.default):
            assert node.args[0].target is qd.dequantize_per_tensor.default
            assert node.args[1].target is qd.dequantize_per_channel.default


def test_weights_are_int8_symmetric_with_one_scale_a_row(tiny: MambaLM) -> None:
    converted = run(tiny, MambaQuantizer().set_global(w8a8()))
    for node in converted.graph.nodes:
        if node.target is qd.dequantize_per_channel.default:
            values, scale, zero_point = (
                torch.fx.graph_module._get_attr(converted, arg.target) for arg in node.args[:3]
            )
            assert values.dtype == torch.int8
            assert scale.shape == (values.shape[0],)
            assert not zero_point.any()
            assert values.abs().amax().item() == 127


@pytest.mark.parametrize("range_", list(Range))
def test_every_observer_gives_a_graph_close_to_the_float_model(tiny: MambaLM, range_: Range) -> None:
    converted = run(tiny, MambaQuantizer().set_global(w8a8(range=range_)))
    ids, states = tokens(2, 16), tiny.initial_states(2)
    with torch.no_grad():
        expected, got = tiny(ids)[0], converted(ids, *states)[0]
    # Random weights at 8 bits: errors of a few percent; a broken scale gives errors of order one.
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_per_token_activations_are_symmetric_and_causal(tiny: MambaLM) -> None:
    converted = run(tiny, MambaQuantizer().set_global(w8a8(Activation.PER_TOKEN)))
    assert counts(converted)["quantize_affine"] == 4 * 2 + 1
    ids, states = tokens(1, 16), tiny.initial_states(1)
    with torch.no_grad():
        full, part = converted(ids, *states)[0], converted(ids[:, :5], *states)[0]
    # One scale a token sees no future token: a prefix gives the same logits, to float32 rounding.
    torch.testing.assert_close(part, full[:, :5], rtol=0, atol=1e-5)


def test_roles_and_modules_can_be_left_out(tiny: MambaLM) -> None:
    quantizer = MambaQuantizer().set_global(w8a8()).set_role("head", None).set_module_name("backbone.layers.0", None)
    ops = counts(run(tiny, quantizer))
    assert ops["quantize_per_tensor"] == 5
    left = {decision.role for decision in quantizer.report.rejected}
    assert left == {
        Role.HEAD,
        Role.IN_PROJ,
        Role.CONV1D,
        Role.X_PROJ,
        Role.DT_PROJ,
        Role.OUT_PROJ,
        Role.SCAN,
        Role.GATE,
    }
    assert all(decision.detail == "switched off by the configuration" for decision in quantizer.report.rejected)


def test_a_tied_head_has_its_own_precision(tiny: MambaLM) -> None:
    graph = mq_ao.quantize(tiny, [tokens(2, 16)], "rtn-w4a8").converted
    head, embedding = (walk.calls(graph, kind)[-1].args for kind in (walk.LINEAR, walk.EMBEDDING))
    assert head[1].target == torch.ops.torchao.dequantize_affine
    assert list(head[1].args[1]) == [1, 64] and head[1].args[5:7] == (-8, 7)
    assert embedding[0].target == qd.dequantize_per_channel.default and embedding[0].args[4:6] == (-127, 127)


def test_the_longest_module_name_wins_over_role_and_global(tiny: MambaLM) -> None:
    only_in_proj = QuantizationConfig({Role.IN_PROJ: RoleSpec()})
    quantizer = (
        MambaQuantizer()
        .set_global(w8a8())
        .set_role(Role.HEAD, None)
        .set_module_name("backbone.layers", None)
        .set_module_name("backbone.layers.1", only_in_proj)
    )
    run(tiny, quantizer)
    assert [(item.role, item.module) for item in quantizer.report.accepted] == [
        (Role.EMBEDDING, "backbone.embedding"),
        (Role.IN_PROJ, "backbone.layers.1.mixer.in_proj"),
    ]


def test_validate_names_a_node_that_lost_its_annotation(tiny: MambaLM) -> None:
    graph = capture(tiny, ())
    quantizer = MambaQuantizer().set_global(w8a8())
    quantizer.annotate(graph)
    victim = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)
    del victim.meta["quantization_annotation"]
    with pytest.raises(MqAoError, match=f"{victim.name} .in_proj. was to be quantized"):
        quantizer.validate(graph)


def test_a_node_that_another_quantizer_took_is_reported_and_fails_validation_only_if_ours_is_missing(
    tiny: MambaLM,
) -> None:
    graph = capture(tiny, ())
    MambaQuantizer().set_global(w8a8()).annotate(graph)
    second = MambaQuantizer().set_global(w8a8())
    second.annotate(graph)
    layers = [item for item in second.report.rejected if item.role not in (Role.SCAN, Role.GATE)]
    assert {item.detail for item in layers} == {"already annotated by another quantizer"}


def test_what_is_unknown_is_refused_with_the_known_names(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="unknown backend 'tpu': the backends are native"):
        MambaQuantizer("tpu")
    with pytest.raises(MqAoError, match="unknown role 'attention': the roles are in_proj, conv1d"):
        MambaQuantizer().set_role("attention", None)
    with pytest.raises(MqAoError, match="no quantizable node lies in a module named 'encoder'.*backbone.embedding"):
        MambaQuantizer().set_module_name("encoder", w8a8()).annotate(capture(tiny, ()))
    with pytest.raises(MqAoError, match="has nothing to do"):
        MambaQuantizer().annotate(capture(tiny, ()))
    with pytest.raises(MqAoError, match="nothing was annotated yet"):
        _ = MambaQuantizer().report


def test_a_spec_without_an_integer_kernel_is_refused() -> None:
    with pytest.raises(MqAoError, match="no integer kernel for conv1d with activation per_token: choose static"):
        MambaQuantizer().set_role("conv1d", RoleSpec(Activation.PER_TOKEN))


def test_a_role_that_was_set_but_is_not_in_the_graph_is_an_error(tiny: MambaLM) -> None:
    class Headless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = tiny

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden, _, _ = self.lm.backbone.layers[0](x, *(state[0] for state in self.lm.initial_states(2)))
            return hidden

    import mq_ao

    graph = mq_ao.export(Headless().eval(), (torch.randn(2, 5, 64),)).module(check_guards=False)
    with pytest.raises(MqAoError, match="set_role.'head'. was called, but no node has that role"):
        prepare_pt2e(graph, MambaQuantizer().set_role("head", RoleSpec()))
