"""Converted graph in, compiled program out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

import mq_ao.ops
from mq_ao.backends import INDUCTOR
from mq_ao.compat.compiling import inductor_settings
from mq_ao.files import owned
from mq_ao.lowering.inductor import packaging
from mq_ao.lowering.inductor.program import InductorModule, InductorProgram, load
from mq_ao.lowering.inductor.rewriter import INTEGER_KERNELS, Rewriter
from mq_ao.lowering.integer_graph import IntegerGraph, fold_constants
from mq_ao.lowering.language_graphs import states_of
from mq_ao.lowering.module_export import export_module, refuse_memory
from mq_ao.lowering.prefill_decode import both
from mq_ao.models.states import States
from mq_ao.ops.native.build import compiler


def rewrite(converted: GraphModule) -> IntegerGraph:
    """Replaces q/dq patterns by integer operators and folds what depends on weights alone.

    Carried states that are quantized become int8 inputs and outputs of the graph. What has no integer kernel is warned
    about and listed.

    Args:
        converted: result of `convert_pt2e`; it is not changed.

    Raises:
        MqAoError: there is nothing quantized in the graph.
    """
    return IntegerGraph.of(Rewriter(copy.deepcopy(converted)), INTEGER_KERNELS)


def compiled(converted: GraphModule, example_args: tuple[Tensor, ...]) -> Any:
    """Compiles a converted graph in this process, with `torch.compile`; see `lower` for programs that can be saved.

    Args:
        converted: result of `convert_pt2e`.
        example_args: inputs to compile for; other batch sizes and lengths recompile or run dynamically.

    Returns:
        A callable with the graph's signature.

    Raises:
        MqAoError: there is nothing quantized in the graph.
    """
    return compiled_float(rewrite(converted).module, example_args)


def compiled_float(module: GraphModule, example_args: tuple[Tensor, ...]) -> Any:
    """Compiles a graph as it is; a float one for comparison with what `compiled` gives.

    Args:
        module: `ExportedProgram.module()`, or what `rewrite` gives.
        example_args: inputs to compile for.
    """
    compiler()
    function = torch.compile(module)

    def run(*args: Any) -> Any:
        # Where it compiles, it freezes: an option of torch.compile would not reach the part that makes constants of
        # parameters, and no convolution that another quantizer annotated would become an integer one.
        with torch.no_grad(), inductor_settings(freezing=True):
            return function(*args)

    run(*example_args)
    return run


def lower(converted: GraphModule, info: Mapping[str, Any], options: None = None) -> InductorProgram | InductorModule:
    """Compiles a converted graph ahead of time.

    A language model's becomes two methods on one copy of the weights: prefill at any length, and decode at length 1.
    That of any other module takes and gives what the module does; sizes vary as in the captured graph.

    Args:
        converted: result of `convert_pt2e`; of a language model, `(input_ids, *states) -> (logits, *states)`.
        info: what the program is to say of itself. With a `vocab_size`, it is a language model's.
        options: there are none.

    Raises:
        MqAoError: there is nothing quantized in the graph, it cannot be saved (see `module_export.export_module`), or
            there is no C++ compiler.
    """
    INDUCTOR.check_options(options)
    if "vocab_size" in info:
        graph = rewrite(converted)
        return _compile(graph.module, states_of(graph.module), {**info, **graph.described})
    refuse_memory(converted)
    graph = rewrite(converted)
    exported, signature = export_module(graph.module)
    return _write({"forward": exported}, {**info, **graph.described, "signature": signature.described})


def lower_float(module: GraphModule, info: Mapping[str, Any], options: None = None) -> InductorProgram:
    """Compiles the float graph of a language model in the same way, for comparison; it has no integer kernels."""
    INDUCTOR.check_options(options)
    states = states_of(module)
    module = copy.deepcopy(module)
    fold_constants(module)
    return _compile(module, states, {**info, "integer_kernels": {}, "simulated": []})


def _compile(module: GraphModule, states: States, info: Mapping[str, Any]) -> InductorProgram:
    program = _write(both(module, states), {**info, "states": states.described})
    assert isinstance(program, InductorProgram)
    return program


def _write(programs: Mapping[str, ExportedProgram], info: Mapping[str, Any]) -> InductorProgram | InductorModule:
    compiler()  # Inductor's own complaint would come late, and say less
    mq_ao.ops.load_native()

    def made(path: Path) -> InductorProgram | InductorModule:
        packaging.write(path, programs, info)
        return load(path)

    return owned("program.pt2", made)  # save() only copies the archive
