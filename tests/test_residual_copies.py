"""Residual streams that are joined with themselves, as Zamba2's are: the rotation passes through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import mq_ao
from mq_ao import passes
from mq_ao.graph import match, walk
from mq_ao.graph.residual import streams
from mq_ao.graph.views import Layer
from mq_ao.models import MambaConfig
from mq_ao.models.mamba import MambaBlock, MambaMixer
from tests.test_capture_states import ids_of
from tests.test_capture_transformers import build

WIDTH = 16


class Joined(nn.Module):
    """Two blocks; before the second, a linear reads the stream beside what it was, `count` values in all."""

    def __init__(self, count: int, *, foreign: bool = False) -> None:
        super().__init__()
        config = MambaConfig(vocab_size=32, d_model=WIDTH, n_layer=1, d_state=4)
        self.embedding = nn.Embedding(32, WIDTH)
        self.first, self.second = (MambaBlock(WIDTH, 1e-5, MambaMixer(config)) for _ in range(2))
        self.norm = nn.RMSNorm(count * WIDTH)
        self.mix = nn.Linear(count * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 8)
        self.count, self.foreign = count, foreign
        nn.init.normal_(self.norm.weight)

    def forward(self, ids: Tensor) -> Tensor:
        start = self.embedding(ids)
        h = start + self.first.mixer(self.first.norm(start))[0]
        beside = torch.tanh(start) if self.foreign else start
        h = h + self.mix(self.norm(torch.cat([h, *[beside] * (self.count - 1)], -1)))
        return self.head(h + self.second.mixer(self.second.norm(h))[0])


def graph_of(model: nn.Module, ids: Tensor) -> GraphModule:
    return mq_ao.export(model.double().eval(), (ids,)).module(check_guards=False)


@pytest.mark.parametrize("count", [2, 3])
def test_the_rotation_passes_through(count: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (4, 40))
    graph = graph_of(Joined(count), ids)
    (stream,) = streams(graph, match(graph).blocks)
    assert stream.problem is None
    widths = {walk.value(Layer.of(reader).x).shape[-1] for reader in stream.readers}
    assert widths == {WIDTH, count * WIDTH}
    with torch.no_grad():
        before = graph(ids)
        rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(ids,)])
        assert float((graph(ids) - before).norm() / before.norm()) < 1e-12
    (applied,) = [item for item in rewrite.transforms if item.name == "rotate_residual"]
    # What all readers read, each part of the joined value among it, has one variance in every channel.
    assert str(applied.status) == "applied" and "now 1" in applied.detail


def test_zamba2_is_rotated_exactly() -> None:
    graph, ids = graph_of(build("Zamba2"), ids_of(2, 9)), ids_of(4, 40, seed=3)
    with torch.no_grad():
        before = graph(ids).logits
        rewrite = passes.apply(graph, ["fold_norm", "rotate_residual"], [(ids,)])
        assert float((graph(ids).logits - before).norm() / before.norm()) < 1e-12
    assert [str(item.status) for item in rewrite.transforms if item.name == "rotate_residual"] == ["applied"]


def test_what_is_joined_from_elsewhere_is_left_out() -> None:
    ids = torch.randint(0, 32, (4, 40))
    graph = graph_of(Joined(2, foreign=True), ids)
    problems = [str(stream.problem) for stream in streams(graph, match(graph).blocks)]
    assert any("aten.tanh.default is not understood" in problem for problem in problems)
    assert "None" not in problems
