"""Mixtures of experts: their linears in integers, the rotation that passes through, and backends without kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.capture.stateful_export import export_with_states
from mq_ao.graph import Role, match, walk
from mq_ao.graph.residual import streams
from mq_ao.graph.views import Experts
from mq_ao.lowering import inductor
from mq_ao.lowering.language_graphs import states_of
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.quantizer import Activation, QuantizationConfig, RoleSpec
from mq_ao.recipes import get_recipe
from tests.test_capture_states import ids_of, in_pieces
from tests.test_capture_transformers import build

NAMES = ("Jamba, experts", "GraniteMoeHybrid, experts", "NemotronH, experts")


def captured(name: str, dtype: torch.dtype = torch.float32) -> GraphModule:
    return mq_ao.export(build(name).to(dtype), (ids_of(2, 9),)).module(check_guards=False)


def with_linears(spec: RoleSpec) -> mq_ao.Recipe:
    recipe = get_recipe("rtn-w8a8")
    return replace(recipe, scheme=QuantizationConfig({**recipe.scheme.roles, Role.LINEAR: spec}))


@pytest.mark.parametrize("name", NAMES)
def test_the_rotation_passes_through(name: str) -> None:
    graph, ids = captured(name, torch.float64), ids_of(2, 9, seed=3)
    assert [stream.problem for stream in streams(graph, match(graph).blocks)] == [None]
    with torch.no_grad():
        before = graph(ids).logits
        weights = [Experts.of(node).weight for node in walk.calls(graph, walk.EXPERTS)]
        rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(ids,)])
        # Some norms of these models stay in float32 whatever the model is.
        assert float((graph(ids).logits - before).norm() / before.norm()) < (1e-12 if "Jamba" in name else 1e-6)
    assert any(item.name == "rotate_residual" and str(item.status) == "applied" for item in rewrite.transforms)
    after = [Experts.of(node).weight for node in walk.calls(graph, walk.EXPERTS)]
    assert not set(weights) & set(after), "each expert's weights are others now"


@pytest.mark.parametrize(
    "spec",
    [
        RoleSpec(),
        RoleSpec(Activation.PER_TOKEN),
        RoleSpec(Activation.PER_TOKEN, bits=4, group_size=8),
        RoleSpec(bits=4, group_size=16),
    ],
)
def test_integers_are_those_of_the_simulation(spec: RoleSpec) -> None:
    name = "NemotronH, experts"
    model = build(name)
    quantized = mq_ao.quantize(model, [ids_of(4, 16, seed=1)], with_linears(spec))
    integer = inductor.rewrite(quantized.converted)
    kernel = "expert_linear_packed" + ("_per_token" if spec.activation is Activation.PER_TOKEN else "")
    assert integer.kernels[f"mq_ao.{kernel}.default"] == 2
    assert not integer.simulated
    states = states_of(export_with_states(model).module(check_guards=False))
    ids = ids_of(2, 12, seed=3)
    wanted = in_pieces(StatefulGraph(quantized.converted, states), ids, [12])
    got = in_pieces(StatefulGraph(integer.module, states), ids, [5, 1, 6])
    # An activation on the border between two integers may fall to either side.
    assert float((got - wanted).norm() / wanted.norm()) < 2e-2


def reasons(quantized: Any) -> set[str]:
    return {item.detail for item in quantized.report().quantization.decisions if item.node.startswith("expert_linear")}


def test_float_inputs_and_other_backends_leave_experts_in_float() -> None:
    model, batches = build("NemotronH, experts"), [ids_of(2, 8, seed=1)]
    spec = RoleSpec(Activation.NONE)
    assert reasons(mq_ao.quantize(model, batches, with_linears(spec))) == {
        "backend 'native' has no integer kernel for experts with float input"
    }
    assert reasons(mq_ao.quantize(model, batches, "rtn-w8a8", backend="cuda")) == {
        "backend 'cuda' has no integer kernel for experts with static 8-bit (histogram) input"
    }


def test_executorch_has_no_experts() -> None:
    message = r"a mixture of experts \(expert_linear.*\), for which backend 'executorch' has no operator"
    with pytest.raises(MqAoError, match=message):
        mq_ao.quantize(build("Jamba, experts"), [ids_of(2, 8)], backend="executorch")


def test_a_saved_program_generates(tmp_path: Path) -> None:
    model = build("Jamba, experts")
    program = mq_ao.quantize(model, [ids_of(4, 16, seed=1)], "mambaquant-w8a8").lower("inductor")
    program.save(tmp_path / "jamba.pt2")
    loaded = mq_ao.load(tmp_path / "jamba.pt2")
    prompt = ids_of(2, 6, seed=2)
    assert sum(count for name, count in loaded.integer_kernels.items() if "expert_linear" in name) == 2
    assert torch.equal(loaded.generate(prompt, 8), program.generate(prompt, 8))
    # Layers of 32 channels: scales, norms and routers in float are more beside the bytes than in a real model.
    assert loaded.weight_bytes < 0.5 * sum(parameter.nbytes for parameter in model.parameters())
