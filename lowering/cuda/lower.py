"""Converted graph in, integer graph or program out, for PyTorch on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from mq_ao.backends import CUDA
from mq_ao.lowering.cuda.device import require_cuda
from mq_ao.lowering.cuda.module import CudaModule
from mq_ao.lowering.cuda.program import CudaProgram
from mq_ao.lowering.cuda.rewriter import INTEGER_KERNELS, Rewriter
from mq_ao.lowering.integer_graph import IntegerGraph, fold_constants
from mq_ao.lowering.language_graphs import states_of, with_positions
from mq_ao.lowering.module_export import export_module, refuse_memory
from mq_ao.lowering.prefill_decode import export_prefill


def rewrite(converted: GraphModule, device: torch.device | str = "cpu") -> IntegerGraph:
    """Replaces q/dq patterns by integer operators, whose CUDA kernels are Triton's.

    The graph's module runs as it is, exported, and under `compiled`, which gives linears of many rows to
    `aten._int_mm`, with zero points, scales and bias behind it for Inductor to fuse. This was not run on a GPU.

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
    return IntegerGraph.of(Rewriter(copy.deepcopy(converted)), INTEGER_KERNELS).to(device)


def lower(converted: GraphModule, info: Mapping[str, Any], options: None = None) -> CudaProgram | CudaModule:
    """Makes a program of a converted graph, on the CPU: nothing in it depends on a GPU being there.

    Args:
        converted: see `rewrite`; of a language model, `(input_ids, *states) -> (logits, *states)`.
        info: what the program is to say of itself. With a `vocab_size`, it is a language model's.
        options: there are none.

    Raises:
        MqAoError: see `rewrite`; or it cannot be saved (see `module_export.export_module`).
    """
    CUDA.check_options(options)
    if "vocab_size" in info:
        graph = rewrite(with_positions(converted))
        return program_of(graph.module, {**info, **graph.described})
    refuse_memory(converted)
    graph = rewrite(converted)
    exported, signature = export_module(graph.module)
    return CudaModule(exported, {**info, **graph.described, "signature": signature.described}, "cpu")


def lower_float(module: GraphModule, info: Mapping[str, Any], options: None = None) -> CudaProgram:
    """Makes a program of the float graph of a language model in the same way, for comparison."""
    CUDA.check_options(options)
    module = with_positions(copy.deepcopy(module))
    fold_constants(module)
    return program_of(module, {**info, "integer_kernels": {}, "simulated": []})


def program_of(module: GraphModule, info: Mapping[str, Any]) -> CudaProgram:
    """The program of a lowered language model's graph with positions, on the CPU."""
    states = states_of(module)
    return CudaProgram(export_prefill(module, states), {**info, "states": states.described}, "cpu")
