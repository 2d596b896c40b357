"""Converted graph in, native program out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from mq_ao.backends import NATIVE
from mq_ao.lowering.integer_graph import IntegerGraph, fold_constants
from mq_ao.lowering.language_graphs import flat, states_of, with_positions
from mq_ao.lowering.module_export import export_module, refuse_memory
from mq_ao.lowering.native import file
from mq_ao.lowering.native.plan import Plan
from mq_ao.lowering.native.program import NativeModule, NativeProgram, program
from mq_ao.lowering.native.rewriter import INTEGER_KERNELS, Rewriter, own_kernels
from mq_ao.lowering.native.stacked_states import write_in_place
from mq_ao.lowering.weights_apart import without_weights


def rewrite(converted: GraphModule) -> IntegerGraph:
    """Replaces q/dq patterns and what stands around them by operators with native kernels.

    Args:
        converted: result of `convert_pt2e`; it is not changed.

    Raises:
        MqAoError: there is nothing quantized in the graph.
    """
    graph = IntegerGraph.of(Rewriter(copy.deepcopy(converted)), INTEGER_KERNELS)
    own_kernels(graph.module)
    return graph


def lower(converted: GraphModule, info: Mapping[str, Any], options: None = None) -> NativeProgram | NativeModule:
    """Makes a program of a converted graph; nothing is compiled.

    Args:
        converted: result of `convert_pt2e`; of a language model, `(input_ids, *states) -> (logits, *states)`.
        info: what the program is to say of itself. With a `vocab_size`, it is a language model's.
        options: there are none.

    Raises:
        MqAoError: there is nothing quantized in the graph, it cannot be saved (see `module_export.export_module`), it
            has an operator that only Python or a compiler can run, or there are no native kernels.
    """
    NATIVE.check_options(options)
    if "vocab_size" in info:
        graph = rewrite(with_positions(converted))
        return _language(graph.module, {**info, **graph.described})
    refuse_memory(converted)
    graph = rewrite(converted)
    exported, signature = export_module(graph.module)
    return _planned(_module(exported), {**info, **graph.described, "signature": signature.described})


def lower_float(module: GraphModule, info: Mapping[str, Any], options: None = None) -> NativeProgram:
    """Makes a program of the float graph of a language model in the same way, for comparison."""
    NATIVE.check_options(options)
    module = with_positions(copy.deepcopy(module))
    fold_constants(module)
    made = _language(module, {**info, "integer_kernels": {}, "simulated": []})
    assert isinstance(made, NativeProgram)
    return made


def _language(module: GraphModule, info: Mapping[str, Any]) -> NativeProgram | NativeModule:
    """The program of a graph with positions."""
    return _planned(module, {**info, "states": states_of(module).described})


def _planned(module: GraphModule, info: Mapping[str, Any]) -> NativeProgram | NativeModule:
    planned, weights = without_weights(flat(module))
    write_in_place(planned)
    return program(file.Saved(Plan.of(planned, len(weights)), weights, info))


def _module(exported: ExportedProgram) -> GraphModule:
    """The graph of an exported module, which holds its weights."""
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module
