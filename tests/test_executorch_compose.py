"""A user's module with a Mamba block in it: our quantizer for the block, XNNPACK's for the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import mq_ao
from mq_ao.lowering import executorch
from mq_ao.models import MambaConfig
from mq_ao.models.mamba import MambaMixer
from mq_ao.ops.native import executorch_build
from mq_ao.quantizer import MambaQuantizer, w8a8

pytest.importorskip("executorch", reason='needs pip install "mq-ao[executorch]"')


class Classifier(nn.Module):
    """Two linears around a Mamba block."""

    def __init__(self) -> None:
        super().__init__()
        self.config = MambaConfig(vocab_size=1, d_model=32, n_layer=1)
        self.first = nn.Linear(8, 32)
        self.mixer = MambaMixer(self.config)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, 8) -> (batch, 5)."""
        c = self.config
        states = x.new_zeros(x.shape[0], c.d_conv - 1, c.d_inner), x.new_zeros(x.shape[0], c.d_inner, c.d_state)
        y, _, _ = self.mixer(torch.relu(self.first(x)), *states)
        return self.last(y.mean(1))


def quantizers() -> ComposableQuantizer:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    rest = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    scheme = w8a8().replaced(embedding=None, head=None)
    return ComposableQuantizer([MambaQuantizer(backend="executorch").set_global(scheme), rest])


def run(module: Any, x: Tensor) -> Tensor:
    """Exports, lowers and runs a rewritten graph as a user would."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    exported = torch.export.export(module, (x,))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    executorch_build.load()
    buffer = edge.to_executorch().buffer
    return Runtime.get().load_program(buffer).load_method("forward").execute([x])[0]


def test_both_quantizers_annotate_their_part_and_the_program_runs() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(2, 12, 8)
    graph = mq_ao.export(model, (x,)).module(check_guards=False)
    prepared = prepare_pt2e(graph, quantizers())
    for seed in range(4):
        prepared(torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(seed)))
    converted = convert_pt2e(prepared)
    linears = converted.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(linears) == 6
    assert all("dequantize" in str(node.args[1].target) for node in linears)
    rewritten = executorch.rewrite(converted)
    calls = [str(node.target) for node in rewritten.graph.nodes if node.op == "call_function"]
    assert "mq_ao.qcausal_conv1d.default" in calls
    with torch.no_grad():
        expected, floats = converted(x), model(x)
    assert (expected - floats).norm() < 0.1 * floats.norm()
    # Steps of one that flip, as in test_executorch.py.
    assert (run(rewritten, x) - expected).norm() < 0.03 * expected.norm()
