"""Calls of the library that make no sense, and models that fail by themselves: one sentence that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import compile_float
from mq_ao.models import MambaLM
from tests.blocks import Blocks, X


class Asserting(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 15, "bad width"
        return self.blocks(x)


class Missing(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks({"a": x}["b"])


class Ungiven(Blocks):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mq_ao.export(Asserting(), (X[0],)), "fails on the example inputs .*: AssertionError: bad width"),
        (lambda: mq_ao.export(Missing(), (X[0],)), "fails on the example inputs .*: KeyError: 'b'"),
        (lambda: mq_ao.export(Blocks(), (X[0], X[1]), dynamic_shapes=({}, {})), "do not fit Blocks.forward: too many"),
        (lambda: mq_ao.export(Blocks(), X[0]), "example inputs are a tuple of positional inputs and a dictionary"),
        (lambda: mq_ao.export(Blocks(), (X[0],), [X[0]]), "example inputs are a tuple of positional inputs and a dict"),
        (lambda: compile_float(Blocks()), "Blocks has no states that it could go on from"),
        (lambda: compile_float(3), "the model is of type int"),
        (lambda: mq_ao.quantize(Blocks(), X, scans=3), "scans is of type int: give a dictionary such as"),
        (lambda: mq_ao.quantize(Blocks(), X, backend=["inductor"]), "unknown backend .* the backends are native, "),
        (lambda: mq_ao.load(None), "a saved program's path is text or a Path, and not NoneType"),
        (
            lambda: mq_ao.export(torch.jit.script(nn.Linear(2, 2)).eval(), (X[0],)),
            "the model is TorchScript",
        ),
        (
            lambda: mq_ao.quantize(mq_ao.quantize(Blocks(), X, "rtn-w8a8").converted, X),
            "this graph is quantized already: give the float one",
        ),
        (
            lambda: mq_ao.quantize(torch.fx.symbolic_trace(nn.Linear(2, 2).eval()), [torch.ones(2, 2)]),
            "does not come from torch.export: capture the model with mq_ao.export",
        ),
    ],
)
def test_it_is_said_in_a_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        call()


def test_a_model_without_embeddings_is_quantized() -> None:
    assert mq_ao.quantize(Ungiven(), X, "rtn-w8a8").report().batches == 2


def test_compiled_language_models_are_unwrapped(tiny: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    lowering = mq_ao.backends.get_backend("inductor").lowering
    monkeypatch.setattr(lowering, "lower_float", lambda graph, info, options: taken.append(info))
    compile_float(torch.compile(tiny))
    compile_float(tiny)
    assert taken[0] == taken[1]
