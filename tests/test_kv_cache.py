"""Keys and values in 8 bits: the option of a recipe, its simulation, and what programs then hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import mq_ao
from mq_ao import MqAoError
from mq_ao.capture.stateful_export import export_with_states
from mq_ao.graph import Role
from mq_ao.lowering.inductor import InductorProgram, rewrite
from mq_ao.lowering.language_graphs import flat, states_of
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models.rows import Rows
from mq_ao.models.states import tensors
from mq_ao.quantizer import Activation, MambaQuantizer, QuantizationConfig, RoleSpec
from mq_ao.quantizer.cached_rows import cached_rows
from mq_ao.recipe_files import from_dict, to_dict
from mq_ao.recipes import get_recipe
from tests.test_capture_states import ids_of, in_pieces
from tests.test_capture_transformers import build

PER_TOKEN = RoleSpec(Activation.PER_TOKEN)
CACHE_ALONE = QuantizationConfig({Role.KV_CACHE: PER_TOKEN})


def with_cache(name: str = "rtn-w8a8") -> mq_ao.Recipe:
    recipe = get_recipe(name)
    return replace(recipe, scheme=recipe.scheme.replaced(kv_cache=PER_TOKEN))


@pytest.fixture(scope="module", params=["Bamba", "Zamba2"])
def program(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, InductorProgram]]:
    model = mq_ao.quantize(build(request.param), [ids_of(4, 16, seed=1)], with_cache())
    yield request.param, model, model.lower("inductor")


def test_programs_decode_as_the_simulation(program: tuple[str, Any, InductorProgram]) -> None:
    name, model, lowered = program
    ids = ids_of(2, 20, seed=3)
    states = states_of(export_with_states(build(name)).module(check_guards=False))
    wanted = in_pieces(StatefulGraph(model.converted, states), ids, [20])
    got = in_pieces(lowered, ids, [9, *[1] * 11])
    # An activation on the border between two integers may fall to either side.
    assert float((got - wanted).norm() / wanted.norm()) < 2e-2
    accepted = [item for item in model.report().quantization.accepted if item.role is Role.KV_CACHE]
    assert accepted
    assert {item.detail for item in accepted} == {"int8 per token input and head"}


def test_the_cache_is_held_in_8_bits(program: tuple[str, Any, InductorProgram], tmp_path: Path) -> None:
    *_, lowered = program
    lowered.save(tmp_path / "program.pt2")
    loaded = mq_ao.load(tmp_path / "program.pt2")
    _, *states = loaded.prefill(ids_of(2, 7))
    held = {item.name: state for item, state in zip(loaded.states.items, states, strict=True) if item.grows}
    assert len(held) % 4 == 0
    for name, rows in held.items():
        assert isinstance(rows, Rows)
        scale = name.endswith("_scale")
        assert rows.values.dtype == (torch.float32 if scale else torch.uint8)
        assert rows.values.shape[-1] == 1 or not scale
        assert len(rows) == 7
    assert torch.equal(loaded.generate(ids_of(2, 5), 6), lowered.generate(ids_of(2, 5), 6))


def captured() -> StatefulGraph:
    return StatefulGraph(export_with_states(build("Bamba")).module(check_guards=False))


def converted(scheme: QuantizationConfig) -> StatefulGraph:
    """The simulation."""
    floats = captured()
    graph = prepare_pt2e(floats.graph, MambaQuantizer().set_global(scheme))
    StatefulGraph(graph, floats.states)(ids_of(4, 16, seed=4))
    return StatefulGraph(convert_pt2e(graph, fold_quantize=True), floats.states)


def test_the_cache_alone_errs_by_half_a_step_of_each_row() -> None:
    """Its simulation gives what it holds: rows rounded once, whatever later calls read."""
    floats, graph = captured(), converted(CACHE_ALONE)
    ids = ids_of(2, 9, seed=5)
    logits, *exact = floats(ids)
    rounded_logits, *rounded = graph(ids)
    (first,) = [place for place, item in enumerate(graph.states.items) if item.name.startswith("key_")][:1]
    wanted, got = exact[first].values, rounded[first].values
    step = wanted.abs().amax(-1, keepdim=True) / 127
    assert ((got - wanted).abs() <= 0.5001 * step).all()
    assert not torch.equal(got, wanted)
    assert 0 < float((rounded_logits - logits).norm() / logits.norm()) < 1e-2


def test_integers_are_those_of_the_simulation() -> None:
    simulation = converted(with_cache().scheme)
    lowered = flat(rewrite(simulation.graph).module)
    states = states_of(lowered)
    ids = ids_of(2, 6, seed=6)
    with torch.no_grad():
        names = (item.name for item in simulation.states.items)
        simulated = dict(zip(names, simulation(ids)[1:], strict=True))
        _, *new = lowered(ids, *tensors(states.zeros(2)))
    held: dict[str, Tensor] = {item.name: value for item, value in zip(states.items, new, strict=True)}
    caches = [name for name in held if f"{name}_scale" in held]
    assert caches
    for name in caches:
        scale = held[f"{name}_scale"]
        rows = (held[name].float() - 128) * scale
        # The rows that are rounded come from integer products, whose float epilogues differ by rounding: by one step at
        # most, where that happens on a border.
        assert ((rows - simulated[name].values).abs() <= 1.01 * scale).all()
        assert ((rows - simulated[name].values).abs() <= 1e-4 * scale).float().mean() > 0.95


def test_what_is_no_state_is_left_in_float() -> None:
    """Prompts alone: the graph has no keys from before."""

    class Alone(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return torch.ops.mq_ao.cached_attention(query, key, key, 0.5)

    example = (torch.zeros(1, 2, 3, 4), torch.zeros(3, 1, 2, 4))
    (found,) = cached_rows(torch.export.export(Alone(), example).module()).values()
    assert getattr(found, "reason", "") == "its keys and values are no inputs of the graph"


def test_only_int8_per_token_is_taken() -> None:
    with pytest.raises(MqAoError, match="no integer kernel for kv_cache with activation static: choose per_token"):
        MambaQuantizer().set_role("kv_cache", RoleSpec())
    with pytest.raises(MqAoError, match="backend 'cuda' has no integer kernel for kv_cache"):
        mq_ao.quantize(build("Bamba"), [ids_of(1, 8)], with_cache(), backend="cuda")


def test_recipes_say_it_and_files_keep_it() -> None:
    recipe = with_cache()
    assert "kv_cache   int8 per token input and head" in str(recipe)
    assert from_dict(to_dict(recipe)) == recipe
