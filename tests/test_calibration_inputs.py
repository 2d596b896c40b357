"""Which input of a captured graph each value of a batch becomes, and what every batch must have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import mq_ao
from mq_ao import MqAoError
from mq_ao.calibration import Calibration
from mq_ao.capture import export
from tests.blocks import Blocks, X

A, B = X[0], 50 * X[1]


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Named(Blocks):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.blocks(a * scale + 0.1 * b)


class Open(Blocks):
    def forward(self, **inputs: Tensor) -> Tensor:
        return self.blocks(inputs["a"] + 0.1 * inputs["b"])


class Nested(Blocks):
    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return self.blocks(inputs["a"] + 0.1 * inputs["more"][0]["b"])


class Tupled(Blocks):
    def forward(self, pair: Pair) -> Tensor:
        return self.blocks(pair.a + 0.1 * pair.b)


def given(model: nn.Module, batches: list[Any]) -> list[tuple[Any, ...]]:
    """The inputs of the graph that is captured from the first batch."""
    calibration = Calibration(model, batches)
    args, kwargs, _ = calibration.first
    return [*calibration.inputs(export(model, args, kwargs).module())]


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Named(), [{"a": A, "b": B}, {"b": B, "a": A}]),
        (Named(), [(A, B), {"b": B, "a": A}]),
        (Open(), [{"a": A, "b": B}, {"b": B, "a": A}]),
        (Nested(), [({"a": A, "more": [{"b": B, "c": A}]},), ({"more": [{"c": A, "b": B}], "a": A},)]),
        (Tupled(), [(Pair(A, B),), {"pair": Pair(A.numpy(), B)}]),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else None,
)
def test_the_order_of_dictionaries_does_not_matter(model: nn.Module, batches: list[Any]) -> None:
    first, second = given(model, batches)
    assert len(first) == len(second) >= 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def by_position() -> ExportedProgram:
    return mq_ao.export(Named(), (A, B))


def by_name() -> ExportedProgram:
    return mq_ao.export(Named(), (), {"b": B, "a": A})


@pytest.mark.parametrize("program", [by_position, by_name])
@pytest.mark.parametrize("batch", [{"a": A, "b": B}, {"b": B, "a": A}])
def test_captured_programs_are_calibrated_by_name(program: Callable[[], ExportedProgram], batch: Any) -> None:
    ranges = []
    for model in (program(), Named()):
        quantized = mq_ao.quantize(model, [batch], "rtn-w8a8")
        nodes = quantized.converted.graph.find_nodes(
            op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
        )
        ranges.append([node.args[1:3] for node in nodes])
    assert ranges[0] == ranges[1]
    assert len(ranges[0]) > 2


def test_what_was_captured_by_name_is_not_taken_by_position() -> None:
    with pytest.raises(MqAoError, match=r"calibration batch 0: .*\(b, a by name\): too many positional arguments"):
        mq_ao.quantize(by_name(), [(A, B)])


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (Open(), [{"a": A, "b": B}, {"a": A, "c": B}], "this holds a, c, and the model was captured with a, b: give"),
        (Open(), [{"a": A, "b": B}, {"a": A, "b": B, "c": B}], "this holds a, b, c, and the model was captured with"),
        (Named(), [(A, B), (A,)], "this holds a, and the model was captured with a, b: give the same inputs"),
        (Named(), [(A, B, 2.0), (A, B, 3.0)], r"scale is 3.0, and the model was captured with 2.0, .* a constant"),
        (Named(), [(A, B, 1.0), (A, B, 1)], "scale is 1, and the model was captured with 1.0"),
        (Named(), [(A, B, 2.0), (A, B, torch.ones(()))], r"scale is tensor\(1.\), and the model was captured with 2.0"),
        (Named(), [(A, B), (A, 2.0)], "b is 2.0, where the model was captured with a tensor"),
        (Nested(), [({"a": A, "more": [{"b": B}]},), ({"a": A, "more": [{"d": B}]},)], "inputs is nested otherwise"),
        (Nested(), [({"a": A, "more": [{"b": B}]},), ({"a": A, "more": ({"b": B},)},)], "inputs is nested otherwise"),
        (Named(), [(A, B), (A, B[:0])], r"b is empty, of shape \(0, 6, 16\): leave the batch out"),
    ],
)
def test_other_inputs_than_the_first_batch_has_are_refused(model: nn.Module, batches: list[Any], message: str) -> None:
    with pytest.raises(MqAoError, match=f"calibration batch 1: {message}"):
        given(model, batches)


def test_constants_that_are_left_out_are_those_of_the_capture() -> None:
    program = mq_ao.export(Named(), (A, B), {"scale": 2.0}).module()
    (inputs,) = Calibration(program, [(A, B)]).inputs(program)
    assert inputs[2] == 2.0


class Chosen(Blocks):
    def forward(self, x: Tensor, pooling: str = "mean", window: int | None = 4) -> Tensor:
        y = self.blocks(x if window is None else x[:, -window:])
        return y.mean(1) if pooling == "mean" else y.amax(1)


@pytest.mark.parametrize("batch", [(A, "max", None), {"x": A, "pooling": "max", "window": None}])
def test_text_and_none_are_constants_like_any_other(batch: Any) -> None:
    quantized = mq_ao.quantize(Chosen(), [batch], "rtn-w8a8")
    with torch.no_grad():
        wanted, got = Chosen()(A, "max", None), quantized.converted(A, "max", None)
    # Of int8, on random weights; another branch is off by its whole size.
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
    with pytest.raises(MqAoError, match="batch 1: pooling is 'mean', and the model was captured with 'max'"):
        given(Chosen(), [batch, (A, "mean", None)])


class Required(Blocks):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.blocks(x if mask is None else x * mask)


def test_none_for_an_input_without_a_default_is_given() -> None:
    assert mq_ao.quantize(Required(), [(A, None), {"mask": None, "x": A}], "rtn-w8a8").report().batches == 2


class Optional(Blocks):
    def forward(self, x: Tensor, mask: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        return self.blocks(x if y is None else x + y)


def test_inputs_behind_one_that_was_left_out_go_by_name() -> None:
    y = X[1]
    program = mq_ao.quantize(Optional(), [{"x": A, "y": y}], "rtn-w8a8").lower()
    assert torch.equal(program(A, y=y), program(A, y=y, mask=None))
    with pytest.raises(MqAoError, match="2 arguments are given: give y by name"):
        program(A, y)


def test_programs_take_dictionaries_in_any_order() -> None:
    program = mq_ao.quantize(Nested(), [({"a": A, "more": [{"b": B}]},)], "rtn-w8a8").lower()
    assert torch.equal(program({"more": [{"b": B}], "a": A}), program({"a": A, "more": [{"b": B}]}))


class ByLength(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if x.shape[1] > 4 else 100 * x)


class ByBatch(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if x.shape[0] == 2 else 100 * x)


@pytest.mark.parametrize(
    ("model", "other", "assumed"), [(ByLength(), A[:, :3], r"x.size\(\)\[1\] >= 5"), (ByBatch(), A[:1], "== 2")]
)
def test_sizes_for_which_a_model_computes_something_else_are_refused(
    model: nn.Module, other: Tensor, assumed: str
) -> None:
    captured = mq_ao.export(model, (A,))
    for source in (model, captured, captured.module()):
        with pytest.raises(MqAoError, match=f"batch 1 .* does not fit the graph.*{assumed}"):
            mq_ao.quantize(source, [A, other], "rtn-w8a8")


def test_saved_programs_refuse_them_too() -> None:
    program = mq_ao.quantize(ByLength(), [A], "rtn-w8a8").lower()
    assert program(A).shape == A.shape
    with pytest.raises(MqAoError, match="5 <= length; length is 3"):
        program(A[:, :3])
    scaled = mq_ao.quantize(Named(), [(A, B, 2.0)], "rtn-w8a8").lower()
    assert torch.equal(scaled(A, B, 2.0), scaled(A, B))
    with pytest.raises(MqAoError, match="made with 2.0 where 3.0 is given"):
        scaled(A, B, 3.0)
