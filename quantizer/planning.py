"""Weights that are rounded before annotation: 4 bits, groups, searched scales, GPTQ."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import edit, walk
from mq_ao.passes.statistics import ChannelStatistics
from mq_ao.quantizer.gptq import gptq
from mq_ao.quantizer.specs import RoleSpec, Rounding
from mq_ao.quantizer.weights import QuantizedWeight, round_to_grid


def needs_plan(spec: RoleSpec) -> bool:
    """Whether an observer of the largest weights does not give what the spec asks for."""
    return spec.bits != 8 or spec.group_size is not None or spec.rounding is not Rounding.NEAREST


def plan_weight(
    model: GraphModule, node: Node, spec: RoleSpec, statistics: Mapping[str, ChannelStatistics]
) -> QuantizedWeight:
    """Quantizes the weight of a layer and leaves the values on the grid in the graph.

    Raises:
        MqAoError: GPTQ was asked for, and there are no second moments of the layer's input.
    """
    index = weight_index(node)
    weight = edit.constant(model, walk.argument(node, index))
    matrix = weight.flatten(1)
    group_size = spec.group_size if spec.group_size and matrix.shape[1] % spec.group_size == 0 else None
    found = statistics.get(walk.argument(node, 0).name)
    if spec.rounding is Rounding.GPTQ:
        if found is None or found.moments is None:
            raise MqAoError(
                f"GPTQ needs second moments of the input of {node.name}: collect the quantizer's requests and give "
                "them to set_statistics, or use mq_ao.quantize."
            )
        planned = gptq(matrix, found.moments / found.count, spec.bits, group_size)
    else:
        # Where statistics were given, inputs count by their power.
        importance = None if found is None or found.channels != matrix.shape[1] else found.squares / found.count
        planned = round_to_grid(matrix, spec.bits, group_size, spec.rounding is Rounding.SEARCH, importance)
    edit.set_operand(model, node, index, planned.dequantized().view(weight.shape))
    return planned


def weight_index(node: Node) -> int:
    """Which argument of a layer is its weight."""
    return 0 if node.target == walk.aten.embedding.default else 1
