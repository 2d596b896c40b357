"""The block matcher: found by dataflow, whatever the modules are called, and honest about what it leaves out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mq_ao import MqAoError, export
from mq_ao.api import capture
from mq_ao.graph import Role, match
from mq_ao.models import MambaLM


class Strange(nn.Module):
    """A Mamba block under other names, with a separate gate projection and sliced instead of split outputs."""

    def __init__(self, *, gate: bool = True, mix: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.three, self.four = nn.Linear(16, 2 + 8, bias=False), nn.Linear(2, 16)
        self.five = nn.Linear(16, 8)
        self.taps = nn.Parameter(torch.randn(16, 4))
        self.decay = nn.Parameter(torch.rand(16, 4))
        self.gate, self.mix = gate, mix

    def forward(self, x: Tensor) -> Tensor:
        u, _ = torch.ops.mq_ao.causal_conv1d(self.one(x), self.taps)
        u = nn.functional.silu(u)
        low = self.three(u)
        delta = nn.functional.softplus(self.four(low[..., :2])) if self.mix else self.four(low[..., :2])
        y, _ = torch.ops.mq_ao.selective_scan(u, delta, -self.decay, low[..., 2:6], low[..., 6:], None, None, True)
        if self.gate:
            y = nn.functional.silu(self.two(x)) * y
        return self.five(y)


def test_finds_every_role_of_the_language_model(tiny: MambaLM) -> None:
    found = match(capture(tiny, ()))
    assert [block.name for block in found.blocks] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    assert len(found.heads) == 1
    assert len(found.embeddings) == 1
    assert found.rejected == ()
    assert Counter(role for role, _ in found.by_role()) == {
        Role.IN_PROJ: 2,
        Role.CONV1D: 2,
        Role.X_PROJ: 2,
        Role.DT_PROJ: 2,
        Role.OUT_PROJ: 2,
        Role.HEAD: 1,
        Role.EMBEDDING: 1,
    }


def test_finds_a_block_under_other_names_with_a_gate_of_its_own() -> None:
    graph = export(Strange().eval(), (torch.randn(2, 5, 8),)).module(check_guards=False)
    (block,) = match(graph).blocks
    weights = {role: node.args[1].target for role, node in block.by_role()}
    assert weights[Role.X_PROJ] == "three.weight"
    assert weights[Role.DT_PROJ] == "four.weight"
    assert weights[Role.OUT_PROJ] == "five.weight"
    assert block.in_proj.args[1].target == "one.weight"
    assert block.gate_proj is not None and block.gate_proj.args[1].target == "two.weight"
    assert [role for role, _ in block.by_role()].count(Role.IN_PROJ) == 2


def test_a_block_without_a_gate_is_a_block() -> None:
    graph = export(Strange(gate=False).eval(), (torch.randn(2, 5, 8),)).module(check_guards=False)
    (block,) = match(graph).blocks
    assert block.gates == () and block.gate_proj is None


def test_a_scan_that_is_not_understood_is_reported_with_the_node_where_the_walk_ended() -> None:
    graph = export(Strange(mix=True).eval(), (torch.randn(2, 5, 8),)).module(check_guards=False)
    found = match(graph)
    assert found.blocks == ()
    scan = next(item for item in found.rejected if item.node.startswith("selective_scan"))
    assert "softplus" in scan.reason and "dt_proj" in scan.reason
    assert scan.reason in found.describe()


def test_a_graph_without_a_scan_is_an_error() -> None:
    graph = export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)).module(check_guards=False)
    with pytest.raises(MqAoError, match="no mq_ao::selective_scan or ssd_scan in the graph"):
        match(graph)


def test_describe_names_every_node(tiny: MambaLM) -> None:
    found = match(capture(tiny, ()))
    text = found.describe()
    for _, node in found.by_role():
        assert node.name in text
    for role in {role for role, _ in found.by_role()}:
        assert role.value in text
