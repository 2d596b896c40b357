"""Lowering to ExecuTorch: one `.pte` with prefill, decode and reset, linears in XNNPACK, scan in our operators.

Importing this needs no executorch; lowering and running do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule

from mq_ao.backends import EXECUTORCH
from mq_ao.errors import MqAoError
from mq_ao.lowering.executorch.kernels import KERNELS
from mq_ao.lowering.executorch.options import Options, Scan
from mq_ao.lowering.executorch.program import ExecutorchModule, ExecutorchProgram, KeptState, load, set_threads

__all__ = [
    "KERNELS",
    "ExecutorchModule",
    "ExecutorchProgram",
    "KeptState",
    "Options",
    "Scan",
    "load",
    "lower",
    "lower_float",
    "rewrite",
    "set_threads",
]


def lower(
    converted: GraphModule, info: Mapping[str, Any], options: Options | None = None
) -> ExecutorchProgram | ExecutorchModule:
    """Lowers a converted graph to one program: XNNPACK runs the linears, our operators scan and convolution.

    A language model's has the methods prefill, decode and reset; that of any other module has one, `forward`. Memory is
    planned when the program is made: the first axis of a module's first input gets the options' batch, and all other
    sizes that vary go up to the options' `max_length`.

    Args:
        converted: result of `convert_pt2e` on a graph annotated by `MambaQuantizer(backend="executorch")`; of a
            language model, `(input_ids, *states) -> (logits, *states)`.
        info: what the program is to say of itself. With a `vocab_size`, it is a language model's.
        options: batch, longest prefill, and what runs the scan.

    Raises:
        MqAoError: no linear of the program would run in integers, it cannot be saved (see
            `module_export.export_module`), it holds operators that ExecuTorch does not have, or executorch is not
            installed.
    """
    EXECUTORCH.check_options(options, Options)
    build = _build()
    return (build.lower if "vocab_size" in info else build.lower_module)(converted, info, options or Options())


def lower_float(module: GraphModule, info: Mapping[str, Any], options: Options | None = None) -> ExecutorchProgram:
    """Lowers the float graph of a language model in the same way, for comparison; it has no integer kernels.

    Raises:
        MqAoError: see `lower`.
    """
    EXECUTORCH.check_options(options, Options)
    return _build().lower_float(module, info, options or Options())


def rewrite(module: GraphModule, options: Options | None = None) -> GraphModule:
    """A copy of a captured or converted graph in the operators that XNNPACK and our library have.

    Where `lower` does not make the program that is wanted: export the result with torch.export, and
    lower it with `to_edge_transform_and_lower` and XNNPACK's partitioner as any other.

    Args:
        module: captured, or converted with q/dq nodes on int8 (`MambaQuantizer(backend="executorch")`); it is not
            changed.
        options: what runs the scan; with `Scan.PORTABLE` scan and convolution stay operators of ours.

    Raises:
        MqAoError: executorch is not installed.
    """
    return _build().rewrite(module, options or Options())


def _build() -> Any:
    try:
        from mq_ao.lowering.executorch import build
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("executorch"):
            raise
        raise MqAoError(
            'a program for ExecuTorch needs the executorch package: install it with pip install "mq-ao[executorch]".'
        ) from error
    return build
