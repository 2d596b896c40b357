"""What goes wrong while calibration data runs through a graph is said with the number of the batch."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError
from mq_ao.graph.partial import Batch, PartialRun
from mq_ao.models import MambaLM
from tests.blocks import Blocks, X
from tests.conftest import tokens

BATCHES = [tokens(2, 12, seed=seed) for seed in range(2)]
BROKEN = {
    "backbone.embedding.weight": "backbone",
    "backbone.layers.1.mixer.in_proj.weight": "layers.1",
    "backbone.layers.1.mixer.conv1d.bias": "layers.1",
    "backbone.layers.1.mixer.x_proj.weight": "layers.1",
    "backbone.layers.1.mixer.dt_proj.bias": "layers.1",
    "backbone.layers.1.mixer.D": "layers.1",
    "backbone.layers.1.mixer.out_proj.weight": "layers.1",
    "backbone.layers.1.norm.weight": "layers.1",
    "backbone.norm_f.weight": "norm_f",
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    # Not what has been folded into the head: logits are not computed while calibrating.
    [*((name, "rtn-w8a8") for name in BROKEN), *((name, "mambaquant-w8a8") for name in list(BROKEN)[:-1])],
)
def test_values_that_overflow_are_named_whatever_makes_them(tiny: MambaLM, name: str, recipe: str) -> None:
    model = copy.deepcopy(tiny)
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        weight[3 if name != "backbone.embedding.weight" else slice(None)] = 1e30
    with pytest.raises(MqAoError, match=rf"batch 0: (NaN or Inf|a value of .*) at node .*{BROKEN[name]}.*: check the"):
        mq_ao.quantize(model, BATCHES, recipe)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_batch_of_an_overflow_is_named(tiny: MambaLM, place: int) -> None:
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.backbone.embedding.weight[255] = 1e30
    batches = [tokens(2, 8, seed=seed).clamp(max=254) for seed in range(3)]
    batches[place][1, 3] = 255
    for recipe in ("rtn-w8a8", "mambaquant-w8a8"):
        with pytest.raises(MqAoError, match=f"batch {place}: .*: check the weights and the inputs before it"):
            mq_ao.quantize(model, batches, recipe)


def test_a_batch_of_several_lengths_is_one_for_messages(tiny: MambaLM) -> None:
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.backbone.embedding.weight[255] = 1e30
    batches = [[[1, 2, 3], [4, 5], [6]], [[7, 8], [9, 255, 10]]]
    for recipe in ("rtn-w8a8", "mambaquant-w8a8"):
        with pytest.raises(MqAoError, match="batch 1: .*: check the weights and the inputs before it"):
            mq_ao.quantize(model, batches, recipe)
    assert mq_ao.quantize(tiny, batches, "rtn-w8a8").report().batches == 2


class Images(Blocks):
    """Attention over the tokens, with a mask, and a linear on (batch, height, width, channels)."""

    def __init__(self) -> None:
        super().__init__(1)
        self.wide = nn.Linear(16, 16)
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.wide(x.unflatten(1, (2, 3))).flatten(1, 2)
        scores = (x.unsqueeze(1) @ x.unsqueeze(1).mT + self.mask).softmax(-1)
        return self.blocks(torch.nn.functional.silu((scores @ x.unsqueeze(1)).squeeze(1) * 1e-30))


def test_overflow_on_more_axes_is_named_and_masks_are_not() -> None:
    model = Images().eval()
    assert mq_ao.quantize(model, X, "rtn-w8a8")
    with torch.no_grad():
        model.wide.weight[3] = 1e25
    with pytest.raises(MqAoError, match=r"batch 0: a value of .* at node .* in wide during calibration"):
        mq_ao.quantize(model, X, "rtn-w8a8")


def _run(function: Any) -> None:
    """Runs a graph whose one operator is `function`, as batch 7."""
    graph = torch.fx.Graph()
    node = graph.call_function(function, (graph.placeholder("x"),))
    graph.output(node)
    PartialRun(torch.fx.GraphModule(nn.Module(), graph), [node]).run_batch(Batch.of([torch.ones(2, 3)], 7))


def _raise(error: Exception) -> Any:
    def operator(x: Tensor) -> Tensor:
        raise error

    return operator


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MqAoError("an operator refuses it."), "batch 7: an operator refuses it."),
        (AssertionError("Guard failed: x > 3"), "batch 7 ((2, 3) torch.float32) does not fit the graph, which was"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is not enough memory for batch 7 ((2, 3)"),
    ],
)
def test_errors_have_the_number_of_the_batch(error: Exception, message: str) -> None:
    with pytest.raises(MqAoError, match=re.escape(message)):
        _run(_raise(error))


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(MqAoError, match="there is not enough memory for batch 7"):
        _run(lambda x: torch.empty(2**60))
