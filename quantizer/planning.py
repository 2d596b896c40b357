"""The integers of every weight, rounded before calibration, and the scales of carried states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import edit, walk
from mq_ao.graph.views import Layer, Scan
from mq_ao.memory import release
from mq_ao.quantizer.fisher import fisher
from mq_ao.quantizer.gptq import gptq
from mq_ao.quantizer.specs import LEARNED_ROUNDINGS, RoleSpec, Rounding
from mq_ao.quantizer.weights import LIMITS, QuantizedWeight, round_to_grid
from mq_ao.statistics import ChannelStatistics, Request
from mq_ao.statistics.gradients import gradient_names, weighted_input_name
from mq_ao.statistics.probe import flat_states_name

_ROOM = 2.0
"""States of long texts reach beyond those of short calibration windows, which begin at zero; being cut costs more than
a coarser step (docs/carried_states.md)."""


def separate_weights(model: GraphModule, layers: Iterable[tuple[Node, RoleSpec]]) -> None:
    """Lets layers that read one weight, but round it in different ways, read it by nodes of their own.

    An embedding's weight of 8 bits may be the head's of 4: pt2e would quantize it once for both.
    """
    first: dict[Node, tuple[object, ...]] = {}
    for node, spec in layers:
        weight, kind = Layer.of(node).weight, (spec.bits, spec.group_size, spec.rounding)
        if weight.op == "get_attr" and first.setdefault(weight, kind) != kind:
            with model.graph.inserting_before(node):
                own = model.graph.get_attr(str(weight.target))
            own.meta = dict(weight.meta)
            node.replace_input_with(weight, own)
    model.recompile()


def plan_weight(
    model: GraphModule, node: Node, spec: RoleSpec, statistics: Mapping[str, ChannelStatistics]
) -> QuantizedWeight:
    """Quantizes the weight of a layer. The graph keeps the float weight, which calibration runs with.

    Raises:
        MqAoError: GPTQ or Fisher rounding was asked for, and there are no statistics for it (`weight_requests`).
    """
    layer = Layer.of(node)
    weight = edit.constant(model, layer.weight)
    matrix = weight.flatten(1)
    group_size = spec.group_size if spec.group_size and matrix.shape[1] % spec.group_size == 0 else None
    if spec.rounding in LEARNED_ROUNDINGS:
        needed = weight_requests(node, spec)
        found = [statistics[request.node] for request in needed if request.node in statistics]
        moments = [one.moments / one.count for one in found if one.moments is not None]
        if len(moments) < len(needed):
            raise MqAoError(
                f"{spec.rounding} rounding needs statistics for {node.name}: collect the quantizer's requests and give "
                "them to set_statistics, or use mq_ao.quantize."
            )
        planned = _learned(matrix, moments, found[0].count, spec, group_size)
    else:
        # Where statistics were given, inputs count by their power.
        given = statistics.get(layer.x.name)
        importance = None if given is None or given.channels != matrix.shape[1] else given.squares / given.count
        planned = round_to_grid(matrix, spec.bits, group_size, spec.rounding is Rounding.SEARCH, importance)
    release()
    return replace(planned, values=planned.values.view(weight.shape))


def weight_requests(node: Node, spec: RoleSpec | None) -> list[Request]:
    """The second moments that the rounding of a layer learns from: of its input, then of gradients of its output."""
    if spec is None or spec.rounding not in LEARNED_ROUNDINGS:
        return []
    if spec.rounding is not Rounding.FISHER or without_gradients(node):
        return [Request(Layer.of(node).x.name, covariance=True)]
    # Moments of drawn gradients are estimates, which are damped by hundredths: float32 is exact enough for them.
    names = (weighted_input_name(node), *gradient_names(node))
    return [Request(name, covariance=True, precision=torch.float32) for name in names]


MOST_OUTPUTS = 8192
"""Of a layer that is rounded for the loss. The head of a large vocabulary has more: its moments, and rounding it, would
cost more than the layers of a small model do."""


def without_gradients(node: Node) -> str | None:
    """Why gradients do not help to round a layer, or None; Fisher rounding is GPTQ then."""
    if node.target not in walk.LINEAR:
        return "gradients of experts are not told apart"
    if (outputs := edit.channels(node)) > MOST_OUTPUTS:
        return f"it has {outputs} outputs, and gradients are kept of {MOST_OUTPUTS} at most"
    other = next((item for item in node.graph.nodes if item.target in walk.WITHOUT_GRADIENT), None)
    return None if other is None else f"{other.name} has no gradient"


def _learned(
    matrix: Tensor, moments: list[Tensor], tokens: int, spec: RoleSpec, group_size: int | None
) -> QuantizedWeight:
    inputs, *outputs = moments
    if not outputs:
        return gptq(matrix, inputs, spec.bits, group_size)
    # Outputs whose gradients are not related to each other's are rounded for themselves.
    parts = matrix.split([len(moment) for moment in outputs])
    found = [
        fisher(part, inputs, moment, spec.bits, group_size, tokens=tokens)
        for part, moment in zip(parts, outputs, strict=True)
    ]
    values, scales = (torch.cat([getattr(one, name) for one in found]) for name in ("values", "scale"))
    return replace(found[0], values=values, scale=scales)


def plan_state(scan: Node, statistics: Mapping[str, ChannelStatistics]) -> Tensor:
    """The step of each carried state of a scan: 127 steps are `_ROOM` times its largest magnitude in calibration.

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
    scale = (_ROOM * found.maximum / steps).float().clamp(min=torch.finfo(torch.float32).tiny)
    return scale.view(Scan.of(scan).a.meta["val"].shape)
