"""Converted graph in, integer graph out, for PyTorch's compiler on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import fast_random_decomps, register_decomposition
from torch.fx import GraphModule

from mq_ao.lowering.cuda.device import require_cuda
from mq_ao.lowering.cuda.rewrite import Rewriter
from mq_ao.lowering.integer_graph import IntegerGraph
from mq_ao.ops.int8_mm import padded_mm


def lower(converted: GraphModule, device: torch.device | str = "cpu") -> IntegerGraph:
    """Replaces q/dq patterns around linears and the embedding by integer operators.

    In the hands of `torch.compile` the result's module is `aten._int_mm` with zero points, scales and bias right behind
    it: Inductor fuses those into its Triton template of the product, where it takes that one. This was not run on a
    GPU.

    Args:
        converted: result of `convert_pt2e` on a graph quantized for backend "cuda"; it is not changed.
        device: where the graph's tensors go. It runs on any device, more slowly off the GPU.

    Returns:
        The graph, with the signature of `converted`; what is simulated in float is warned about and listed.

    Raises:
        MqAoError: nothing is quantized in the graph, or a GPU was asked for and there is none that can run it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        require_cuda(device)
    module = copy.deepcopy(converted)
    return IntegerGraph.of(module, Rewriter(module).run()).to(device)


@register_decomposition([torch.ops.mq_ao.int8_mm.default])
def _inlined(a: Tensor, b: Tensor) -> Any:
    """In Inductor's hands the operator is the product that it can fuse with; elsewhere it stays whole."""
    return padded_mm(a, b) if a.device.type == "cuda" else NotImplemented


# Inductor copies its table when it first compiles, which may have been before this file was imported.
fast_random_decomps.cache_clear()
