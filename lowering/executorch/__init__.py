"""Lowering to ExecuTorch: one `.pte` with prefill, decode and reset, linears in XNNPACK, scan in our operators.

Importing this needs no executorch; lowering and running do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule

from mq_ao.errors import MqAoError
from mq_ao.lowering.executorch.options import Options, Scan
from mq_ao.lowering.executorch.program import ExecutorchProgram, KeptState, set_threads

__all__ = ["ExecutorchProgram", "KeptState", "Options", "Scan", "lower", "lower_float", "set_threads"]


def lower(converted: GraphModule, info: Mapping[str, Any], options: Options | None = None) -> ExecutorchProgram:
    """Lowers a converted language model to one program: XNNPACK runs the linears, our operators scan and convolution.

    Args:
        converted: result of `convert_pt2e` on the graph `(input_ids, conv_state, ssm_state) -> (logits, ...)`,
            annotated by `MambaQuantizer(backend="executorch")`.
        info: what the program is to say of itself; needs `vocab_size`.
        options: batch, longest prefill, and what runs the scan.

    Raises:
        MqAoError: no linear of the program would run in integers, the graph is not a language model's, or executorch
            is not installed.
    """
    return _build().lower(converted, info, options or Options())


def lower_float(module: GraphModule, info: Mapping[str, Any], options: Options | None = None) -> ExecutorchProgram:
    """Lowers the float graph of a language model in the same way, for comparison; it has no integer kernels.

    Raises:
        MqAoError: see `lower`.
    """
    return _build().lower_float(module, info, options or Options())


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
