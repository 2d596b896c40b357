"""What the lowerings to PyTorch's own compilers share: an integer graph, its kernels counted, its constants folded."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from mq_ao.compat.compiling import constant_fold
from mq_ao.errors import MqAoError
from mq_ao.graph import edit, walk
from mq_ao.lowering.graph_rewriter import GraphRewriter
from mq_ao.lowering.patterns import simulated_nodes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IntegerGraph:
    """A converted graph after its q/dq patterns became integer operators.

    Attributes:
        module: the graph.
        kernels: number of calls of each integer kernel.
        simulated: nodes whose quantization no integer kernel takes: they compute in float on dequantized values.
    """

    module: GraphModule
    kernels: dict[str, int]
    simulated: list[str]

    @classmethod
    def of(cls, rewriter: GraphRewriter, kernels: frozenset[object]) -> IntegerGraph:
        """Rewrites a graph; names and warns about what is simulated, and folds what depends on weights alone.

        Args:
            rewriter: of the graph, which is edited.
            kernels: integer operators of the backend.

        Raises:
            MqAoError: nothing is quantized in the graph, or the backend cannot hold a weight as it was.
        """
        rewriter.run()
        module = rewriter.module
        counts = count_kernels(module, kernels)
        simulated = simulated_nodes(module)
        if simulated:
            logger.warning(
                "mq_ao has no integer kernel for the quantization of %s: simulated in float, unless Inductor has one",
                ", ".join(simulated),
            )
        fold_constants(module)
        return cls(module, dict(counts), simulated)

    @property
    def described(self) -> dict[str, Any]:
        """What programs say of themselves."""
        return {"integer_kernels": self.kernels, "simulated": self.simulated}

    def to(self, device: torch.device) -> IntegerGraph:
        """The same graph with its tensors on another device; they are moved, not copied."""
        return replace(self, module=self.module.to(device))


def count_kernels(module: GraphModule, kernels: frozenset[object]) -> Counter[str]:
    """Calls of integer kernels in a lowered graph, by operator name.

    Args:
        module: the lowered graph.
        kernels: the backend's integer operators.

    Raises:
        MqAoError: there are none, so nothing would run in integers.
    """
    counts = Counter(str(node.target) for node in walk.calls(module, kernels))
    if not counts:
        raise MqAoError(
            "no integer kernel in the lowered graph: nothing in it was quantized. Check the quantizer's report, and "
            "that convert_pt2e was called on the prepared graph."
        )
    return counts


def fold_constants(module: GraphModule) -> None:
    """Computes what depends on weights alone, such as A = -exp(A_log), once and for all."""
    for node in walk.calls(module, {torch.ops.aten._assert_tensor_metadata.default}):
        module.graph.erase_node(node)
    # Or what is folded would hold its history, and could not be copied.
    module.requires_grad_(False)
    # Folding a transposed view would make it contiguous in the saved program, and every call would copy it.
    constant_fold(module, lambda node: node.target != torch.ops.aten.t.default)
    edit.drop_unused_tensors(module)
