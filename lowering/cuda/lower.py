"""Converted graph in, integer graph out, for PyTorch on a GPU."""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule

from mq_ao.lowering.cuda import inlined  # noqa: F401  (tells Inductor of `aten._int_mm`)
from mq_ao.lowering.cuda.device import require_cuda
from mq_ao.lowering.cuda.rewrite import Rewriter
from mq_ao.lowering.integer_graph import IntegerGraph


def lower(converted: GraphModule, device: torch.device | str = "cpu") -> IntegerGraph:
    """Replaces q/dq patterns by integer operators, whose CUDA kernels are Triton's.

    The graph's module runs as it is, under `torch.compile`, and exported. Compiled, linears of many rows become
    `aten._int_mm` with zero points, scales and bias behind it, which Inductor fuses into its template of the product
    where it takes that one. This was not run on a GPU.

    Args:
        converted: result of `convert_pt2e` on a graph quantized for backend "cuda"; it is not changed.
        device: where the graph's tensors go. On the CPU it runs the operators' references.

    Returns:
        The graph, with the signature of `converted`; what is simulated in float is warned about and listed.

    Raises:
        MqAoError: nothing is quantized in the graph, a group of weights does not divide a linear's inputs, or a GPU was
            asked for and there is none that can run it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        require_cuda(device)
    module = copy.deepcopy(converted)
    return IntegerGraph.of(module, Rewriter(module).run()).to(device)
