"""Converted graph in, ExecuTorch program out."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch.export import ExportedProgram
from torch.fx import GraphModule

from mq_ao.compat.compiling import constant_fold
from mq_ao.compat.tracing import SpecViolationError
from mq_ao.errors import MqAoError, first_line
from mq_ao.files import owned
from mq_ao.graph import edit, walk
from mq_ao.graph.views import Linear
from mq_ao.lowering.executorch.delegates import Delegation, delegation, refusals
from mq_ao.lowering.executorch.info import (
    FORMAT,
    INFO,
    MAX_CONTEXT,
    MAX_LENGTH,
    NO_LIMIT,
    VOCAB_SIZE,
    runner_constants,
    versions,
)
from mq_ao.lowering.executorch.kernels import KERNELS
from mq_ao.lowering.executorch.methods import export_methods
from mq_ao.lowering.executorch.options import Options, Scan
from mq_ao.lowering.executorch.partitioner import StagedPartitioner
from mq_ao.lowering.executorch.portable import OPERATORS
from mq_ao.lowering.executorch.program import ExecutorchModule, ExecutorchProgram, load
from mq_ao.lowering.executorch.rewriter import Rewriter
from mq_ao.lowering.language_graphs import states_of
from mq_ao.lowering.module_export import export_module, refuse_memory
from mq_ao.lowering.patterns import DEQUANTIZE, DQ_STATIC, Q_STATIC, grid_of, simulated_nodes

logger = logging.getLogger(__name__)

_STATIC = frozenset({DQ_STATIC, Q_STATIC})


def lower(converted: GraphModule, info: Mapping[str, Any], options: Options) -> ExecutorchProgram:
    """See the package's `lower`."""
    program = _lower(converted, info, options)
    _check_integers(program.integer_kernels)
    return program


def lower_module(converted: GraphModule, info: Mapping[str, Any], options: Options) -> ExecutorchModule:
    """See the package's `lower`."""
    refuse_memory(converted)
    graph = rewrite(converted, options)
    operators = OPERATORS if options.scan is Scan.PORTABLE else {}
    exported, signature = export_module(graph, options.batch, options.max_length, operators)
    made = _partition({"forward": exported}, "forward", graph, {**info, "signature": signature.described}, options)
    program = _write(*made, {})
    assert isinstance(program, ExecutorchModule)
    _check_integers(program.integer_kernels)
    return program


def _check_integers(kernels: Mapping[str, int]) -> None:
    if not any(kind.startswith("xnnpack") for kind in kernels):
        raise MqAoError(
            "no linear of this program runs in integers: quantize for this backend, with "
            'mq_ao.quantize(..., backend="executorch") or MambaQuantizer(backend="executorch").'
        )


def lower_float(module: GraphModule, info: Mapping[str, Any], options: Options) -> ExecutorchProgram:
    """See the package's `lower_float`."""
    return _lower(module, info, options)


def rewrite(module: GraphModule, options: Options) -> GraphModule:
    """A copy of a captured or converted graph in the operators that XNNPACK and our library have.

    Args:
        module: captured, or converted with q/dq nodes on int8; it is not changed.
        options: what runs the scan.
    """
    walk.check_experts(module, KERNELS.backend)
    module = copy.deepcopy(module)
    # Weights that are computed become parameters, of which linears can have rows.
    _fold(module)
    Rewriter(module, native=options.scan is Scan.NATIVE).run()
    for node in walk.calls(module, {torch.ops.aten._assert_tensor_metadata.default}):
        module.graph.erase_node(node)
    for node in walk.calls(module, {torch.ops.aten.clone.default}):
        # Nothing is overwritten, and XNNPACK may not give what it was given.
        if not node.kwargs and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(walk.argument(node, 0))
            module.graph.erase_node(node)
    _fold(module)
    edit.drop_unused_tensors(module)
    return module.requires_grad_(False)


def _fold(module: GraphModule) -> None:
    # XNNPACK takes weights in integers.
    constant_fold(module, lambda node: node.target not in DEQUANTIZE)


def _lower(module: GraphModule, info: Mapping[str, Any], options: Options) -> ExecutorchProgram:
    graph = rewrite(module, options)
    states = states_of(graph)
    vocab_size = int(info["vocab_size"])
    max_count = options.max_count(vocab_size)
    programs = export_methods(graph, states, options, max_count)
    constants: dict[str, Any] = {MAX_LENGTH: options.max_length, VOCAB_SIZE: vocab_size}
    if options.runner:
        constants |= {MAX_CONTEXT: NO_LIMIT, **runner_constants(info)}
    described = {**info, "max_count": max_count, "states": states.described}
    if any(item.grows for item in states.items):
        constants[MAX_CONTEXT] = options.max_context
        described["max_context"] = options.max_context
    made = _partition(programs, next(iter(programs)), graph, described, options)
    program = _write(*made, constants)
    assert isinstance(program, ExecutorchProgram)
    return program


def _partition(
    programs: Mapping[str, ExportedProgram], counted: str, graph: GraphModule, info: Mapping[str, Any], options: Options
) -> tuple[EdgeProgramManager, dict[str, Any]]:
    """Gives XNNPACK what it takes; returns the methods, and all that they say of themselves.

    Args:
        programs: by name of the method.
        counted: the method whose integer kernels are counted.
        graph: what they were exported from.
        info: what else is to be said.
        options: what they were made for.
    """
    with refusals() as refused, _no_operator():
        edge = to_edge_transform_and_lower(dict(programs), partitioner=[StagedPartitioner()])
    methods = {name: delegation(edge.exported_program(name), refused) for name in programs}
    for name, item in methods.items():
        if item.linears_outside:
            logger.warning("XNNPACK did not take %d linears of %s: they run in float", item.linears_outside, name)
    return edge, {
        **info,
        **versions(),
        "format": FORMAT,
        "batch": options.batch,
        "max_length": options.max_length,
        "scan": str(options.scan),
        "integer_kernels": _integer_kernels(methods[counted]),
        "simulated": _in_float(graph),
        "packed_once": _packs_alike(graph),
        "methods": {name: item.to_dict() for name, item in methods.items()},
    }


def _packs_alike(graph: GraphModule) -> bool:
    """Whether linears with the same integers have the same scales too, so that XNNPACK may pack them once."""
    seen: dict[str, tuple[Any, ...]] = {}
    for node in walk.calls(graph, walk.LINEAR):
        linear = Linear.of(node)
        if linear.weight.target not in DEQUANTIZE:
            continue
        values, scales = (_digest(edit.constant(graph, arg)) for arg in linear.weight.all_input_nodes[:2])
        around = [grid_of(item) for item in (linear.x, walk.only_user(node)) if item and item.target in _STATIC]
        if seen.setdefault(values, (scales, around)) != (scales, around):
            return False
    return True


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _in_float(graph: GraphModule) -> list[str]:
    """Names of scans and convolutions whose operands were quantized, and that run in float all the same."""
    simulated = set(simulated_nodes(graph))
    return [node.name for node in walk.calls(graph, walk.SCAN | walk.SSD | walk.CONV) if node.name in simulated]


def _integer_kernels(method: Delegation) -> dict[str, int]:
    """Calls of integer kernels in one prefill: linears in XNNPACK by their kind, and our operators."""
    ours = {name: count for name, count in method.outside.items() if name.startswith("mq_ao::q")}
    return {**{f"xnnpack linear, {kind}": count for kind, count in method.integer_linears.items()}, **ours}


@contextlib.contextmanager
def _no_operator() -> Iterator[None]:
    """Makes an MqAoError of what ExecuTorch says of operators that it does not have."""
    try:
        yield
    except (SpecViolationError, RuntimeError) as error:
        reason = first_line(error)
        raise MqAoError(
            f"ExecuTorch cannot take this model: {reason} Leave that part out, or quantize for inductor or cuda."
        ) from error


def _write(
    edge: EdgeProgramManager, info: Mapping[str, Any], constants: Mapping[str, Any]
) -> ExecutorchProgram | ExecutorchModule:
    said = {INFO: json.dumps(info), **constants}
    # Anew: what is said of delegates is known only now.
    edge = EdgeProgramManager({name: edge.exported_program(name) for name in info["methods"]}, said)
    planning = MemoryPlanningPass(share_mutable_buffers=True)
    with warnings.catch_warnings(), _no_operator():
        # That states start from zero is what is wanted.
        warnings.filterwarnings("ignore", message="Mutation on a buffer")
        program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))

    def made(path: Path) -> ExecutorchProgram | ExecutorchModule:
        with path.open("wb") as file:
            program.write_to_file(file)
        return load(path)

    return owned("program.pte", made)  # save() only copies the file
