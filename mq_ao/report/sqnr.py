"""The float graph and the quantized one, run side by side and compared node by node."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from mq_ao.errors import MqAoError
from mq_ao.quantizer.report import Decision
from mq_ao.quantizer.specs import CACHED_ROLES
from mq_ao.report.data import NodeQuality

_CHUNK = 2**20  # values that are in float64 at once


def node_qualities(
    reference: GraphModule, converted: GraphModule, batch: tuple[Any, ...], decisions: Iterable[Decision]
) -> tuple[NodeQuality, ...]:
    """SQNR of the output of every quantized node, in graph order.

    Both graphs advance in step, so that no more than what either needs to go on is in memory.

    Args:
        reference: rewritten float graph.
        converted: what `convert_pt2e` made of it; nodes are paired by name, which it keeps.
        batch: positional inputs of both.
        decisions: of the quantizer; those left in float are skipped, and carried states, which one call does not show.

    Raises:
        MqAoError: a quantized node is missing in either graph.
    """
    quantized = {item.node: item for item in decisions if item.accepted and item.role not in CACHED_ROLES}
    pairs = zip(values(reference, batch, quantized), values(converted, batch, quantized), strict=True)
    return tuple(_quality(quantized[name], before, after) for (name, before), (_, after) in pairs)


def sqnr(reference: Tensor, got: Tensor) -> float:
    """10 log10(sum reference^2 / sum (reference - got)^2) in dB, summed in float64.

    Args:
        reference: any shape, floating.
        got: of the same shape.

    Returns:
        Inf where both are equal, NaN where `reference` is zero and `got` is not.
    """
    signal = noise = 0.0
    for a, b in zip(reference.flatten().split(_CHUNK), got.flatten().split(_CHUNK), strict=True):
        signal += float(a.double().square().sum())
        noise += float((a.double() - b.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else math.nan


def values(module: GraphModule, batch: tuple[Any, ...], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Runs a graph and yields the named nodes' outputs as they come, the first of those that have several.

    Raises:
        MqAoError: the graph has no such node.
    """
    missing = set(names) - {node.name for node in module.graph.nodes}
    if missing:
        raise MqAoError(f"the graph has no node {', '.join(sorted(missing))}: it is not that of the quantization.")
    yield from _Steps(module).values(batch, names)


class _Steps(Interpreter):
    """Runs a graph with a pause after every node that is looked at."""

    def values(self, batch: tuple[Any, ...], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        self.args_iter = iter(self.graph.process_inputs(*batch))
        for node in self.graph.nodes:
            # Not around the yield: the caller's gradients are its own affair.
            with torch.no_grad():
                value = self.env[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, []):
                del self.env[done]
            if node.name in names:
                yield node.name, value[0] if isinstance(value, tuple | list) else value


def _quality(item: Decision, before: Tensor, after: Tensor) -> NodeQuality:
    return NodeQuality(item.node, item.module, str(item.role), sqnr(before, after), str(tuple(before.shape)))
