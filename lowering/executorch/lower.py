"""Converted graph in, ExecuTorch program out."""

from __future__ import annotations

import copy

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch._inductor.constant_folding import constant_fold
from torch.fx import GraphModule

from mq_ao.graph import edit, walk
from mq_ao.lowering.executorch.methods import export_methods
from mq_ao.lowering.executorch.rewrite import Rewriter
from mq_ao.lowering.executorch.states import buffers
from mq_ao.lowering.graphs import StateShapes
from mq_ao.lowering.patterns import DEQUANTIZE


def rewrite(converted: GraphModule) -> GraphModule:
    module = copy.deepcopy(converted)
    Rewriter(module).run()
    for node in walk.calls(module, {torch.ops.aten._assert_tensor_metadata.default}):
        module.graph.erase_node(node)
    constant_fold(module, lambda node: node.target not in DEQUANTIZE)
    edit.drop_unused_tensors(module)
    return module


def lower_language_model(converted, info, batch=1, max_length=512):
    module = rewrite(converted)
    module.requires_grad_(False)
    shapes = StateShapes.of(module)
    programs = export_methods(module, buffers(shapes, batch), batch, max_length)
    edge = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()], constant_methods={})
    return edge
