"""Views of calls: every field is what the operator's schema says, however the call is written."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from mq_ao.graph import edit, views, walk
from mq_ao.graph.views import Argument, View
from mq_ao.lowering import patterns
from mq_ao.lowering.patterns import Quantized

aten, mq = torch.ops.aten, torch.ops.mq_ao

_LAYER = {"x": "input", "weight": "weight", "bias": "bias"}
_OURS = {**_LAYER, "x": "x"}
_ATENS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default)
_EXPERTS = {"x": "x", "weight": "weight"}
_ROWS = ("key", "value", "past_key", "past_value")
_ATTENTION = {name: name for name in ("query", *_ROWS, *(f"{name}_scale" for name in _ROWS), "scaling", "starts")}
_NORM = {"x": "input", "shape": "normalized_shape", "weight": "weight", "eps": "eps"}
_STATES = {
    "u": "u",
    "delta": "delta",
    "a": "A",
    "b": "B",
    "bias": "delta_bias",
    "softplus": "delta_softplus",
    "initial_state": "initial_state",
}
_DUALITY = {"u": "x", "delta": "dt", "bias": "dt_bias", "softplus": "dt_softplus"}
_LIMITS = {name: name for name in ("dt_min", "dt_max", "seq_idx")}
_READ = {"c": "C", "skip": "D"}
_STATIC = {
    "x": "input",
    "scale": "scale",
    "zero_point": "zero_point",
    "low": "quant_min",
    "high": "quant_max",
    "dtype": "dtype",
}
TABLE: list[tuple[type[View], Any, dict[str, str]]] = [
    (views.Layer, aten.linear.default, _LAYER),
    (views.Layer, mq.causal_conv1d.default, _OURS),
    *((views.Layer, target, _LAYER) for target in _ATENS),
    (views.Layer, aten.embedding.default, {"x": "indices", "weight": "weight"}),
    (views.Linear, aten.linear.default, _LAYER),
    (views.Conv, mq.causal_conv1d.default, {**_OURS, "initial_state": "initial_state", "activation": "activation"}),
    *((views.Conv, target, _LAYER) for target in _ATENS),
    (views.Layer, mq.expert_linear.default, _EXPERTS),
    (views.Experts, mq.expert_linear.default, {**_EXPERTS, "ends": "ends"}),
    (views.Attention, mq.cached_attention.default, _ATTENTION),
    (views.Norm, aten.rms_norm.default, _NORM),
    (views.Norm, aten.layer_norm.default, {**_NORM, "bias": "bias"}),
    (views.Scan, mq.selective_scan.default, {**_STATES, **_READ}),
    (views.Scan, mq.scan_states.default, _STATES),
    (views.Scan, mq.ssd_scan.default, {**_STATES, **_READ, **_DUALITY, **_LIMITS}),
    (Quantized, patterns.Q_STATIC, _STATIC),
    (Quantized, patterns.DQ_STATIC, _STATIC),
    (Quantized, patterns.DQ_CHANNEL, {**_STATIC, "scale": "scales", "zero_point": "zero_points", "axis": "axis"}),
    (Quantized, patterns.DQ_AFFINE, {**_STATIC, "block_size": "block_size", "dtype": "input_dtype"}),
]
"""Every view and operator: what the schema calls its fields."""
_ABSENT = {"bias", "initial_state", "activation"}
"""What is None for operators that have no such argument; other fields raise."""


def subclasses(view: type[View]) -> set[type[View]]:
    return {item for direct in view.__subclasses__() for item in (direct, *subclasses(direct))}


def fields(view: type[View]) -> set[str]:
    return {name for kind in view.__mro__ for name, value in vars(kind).items() if isinstance(value, Argument)}


def schema(target: Any) -> list[Any]:
    return list((target.default if target is patterns.DQ_AFFINE else target)._schema.arguments)


@st.composite
def calls(draw: st.DrawFn, target: Any) -> tuple[Node, dict[str, Any]]:
    """A call of an operator, and all its arguments: those with defaults may be left out, all may be keywords."""
    graph, arguments = Graph(), schema(target)
    last = draw(st.integers(0, len(arguments)))
    args, kwargs, expected = [], {}, {}
    for place, item in enumerate(arguments):
        # Any value will do: nothing runs.
        value = graph.placeholder(item.name) if "Tensor" in str(item.type) else f"value of {item.name}"
        left_out = item.has_default_value() and draw(st.booleans())
        if place < last and place == len(args) and not item.kwarg_only and not left_out:
            args.append(value)
        elif not left_out:
            kwargs[item.name] = value
        expected[item.name] = item.default_value if left_out else value
    return graph.call_function(target, tuple(args), kwargs), expected


def test_the_table_holds_every_view_and_operator() -> None:
    for view in subclasses(View):
        assert {target for known, target, _ in TABLE if known is view} == view.operators
        assert {name for known, _, names in TABLE if known is view for name in names} == fields(view)


@pytest.mark.parametrize(("view", "target", "names"), [row for row in TABLE if row[0] in (views.Conv, views.Scan)])
def test_every_argument_of_our_operators_has_a_field(view: type[View], target: Any, names: dict[str, str]) -> None:
    if target.namespace == "mq_ao":
        assert set(names.values()) == {item.name for item in schema(target)}, f"{view.__name__} lacks a field"


@pytest.mark.parametrize(("view", "target", "names"), TABLE)
@given(data=st.data())
def test_fields_are_what_the_schema_says(view: type[View], target: Any, names: dict[str, str], data: Any) -> None:
    node, expected = data.draw(calls(target))
    call = view.of(node)
    assert {field: getattr(call, field) for field in names} == {field: expected[name] for field, name in names.items()}
    for field in fields(view) - set(names):
        if field in _ABSENT:
            assert getattr(call, field) is None
        else:
            with pytest.raises(TypeError, match="has no argument"):
                getattr(call, field)


@pytest.mark.parametrize(("view", "target", "names"), TABLE)
@given(data=st.data())
def test_assigning_a_field_changes_that_argument_alone(
    view: type[View], target: Any, names: dict[str, str], data: Any
) -> None:
    node, expected = data.draw(calls(target))
    field = data.draw(st.sampled_from(sorted(names)))
    new = node.graph.placeholder("new")
    setattr(view.of(node), field, new)
    assert walk.arguments(node) == {**expected, names[field]: new}
    # As a call it is still valid: no argument is there twice.
    assert len(node.args) <= sum(not item.kwarg_only for item in schema(target))
    assert not set(node.kwargs) & {item.name for item in schema(target)[: len(node.args)]}
    assert new in node.all_input_nodes


def test_a_convolution_of_atens_is_not_read_as_ours() -> None:
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    conv = views.Conv.of(graph.call_function(aten.conv1d.padding, (x, weight, None, [2], "same", [1], 4)))
    assert (conv.x, conv.weight, conv.bias, conv.initial_state, conv.activation) == (x, weight, None, None, None)
    with pytest.raises(TypeError, match="conv1d.*has no argument activation"):
        conv.activation = "silu"


def test_arguments_that_are_keywords_alone_are_set_as_such() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.add.Tensor, (x, x))
    edit.set_argument(node, "alpha", 2)
    assert (node.args, node.kwargs) == ((x, x), {"alpha": 2})


def test_other_operators_are_refused() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    with pytest.raises(TypeError, match=r"mul calls aten\.mul\.Tensor, which Linear does not know"):
        views.Linear.of(graph.call_function(aten.mul.Tensor, (x, x), name="mul"))
    with pytest.raises(TypeError, match="has no argument bias"):
        edit.set_argument(graph.call_function(aten.mul.Tensor, (x, x)), "bias", x)
    with pytest.raises(TypeError, match="getitem.* has no schema"):
        walk.arguments(graph.call_function(operator.getitem, (x, 0)))
