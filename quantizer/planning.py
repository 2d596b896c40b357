"""The integers of every weight, rounded before calibration, and the scales of carried states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import edit
from mq_ao.graph.views import Layer, Scan
from mq_ao.memory import release
from mq_ao.quantizer.gptq import gptq
from mq_ao.quantizer.specs import RoleSpec, Rounding
from mq_ao.quantizer.weights import LIMITS, QuantizedWeight, round_to_grid
from mq_ao.statistics import ChannelStatistics
from mq_ao.statistics.probe import flat_states_name


def plan_weight(
    model: GraphModule, node: Node, spec: RoleSpec, statistics: Mapping[str, ChannelStatistics]
) -> QuantizedWeight:
    """Quantizes the weight of a layer. The graph keeps the float weight, which calibration runs with.

    Raises:
        MqAoError: GPTQ was asked for, and there are no second moments of the layer's input.
    """
    layer = Layer.of(node)
    weight = edit.constant(model, layer.weight)
    matrix = weight.flatten(1)
    group_size = spec.group_size if spec.group_size and matrix.shape[1] % spec.group_size == 0 else None
    found = statistics.get(layer.x.name)
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
    release()
    return replace(planned, values=planned.values.view(weight.shape))


def plan_state(scan: Node, statistics: Mapping[str, ChannelStatistics]) -> Tensor:
    """The step of each carried state of a scan: its largest magnitude over all tokens of the calibration is 127 steps.

    Returns:
        (channels, d_state) float32, positive: a state that is always 0 has the smallest step there is.

    Raises:
        MqAoError: there are no statistics of the states.
    """
    found = statistics.get(flat_states_name(scan))
    if found is None:
        raise MqAoError(
            f"an int8 carried state needs statistics of the states of {scan.name}: collect the quantizer's requests "
            "and give them to set_statistics, or use mq_ao.quantize."
        )
    _, steps = LIMITS[8]
    scale = (found.maximum / steps).float().clamp(min=torch.finfo(torch.float32).tiny)
    return scale.view(Scan.of(scan).a.meta["val"].shape)
