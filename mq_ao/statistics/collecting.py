"""Collects statistics: one run of a float graph over calibration data, in one process or in many."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph.partial import PartialRun
from mq_ao.graph.walk import module_path
from mq_ao.progress import with_bar
from mq_ao.statistics.accumulators import Accumulator, is_distributed, reduce, report_failure
from mq_ao.statistics.channels import ChannelStatistics, Request, Statistics
from mq_ao.statistics.gradients import GradientRun
from mq_ao.statistics.probe import with_states

logger = logging.getLogger(__name__)


@torch.no_grad()
def collect(
    module: GraphModule,
    requests: Iterable[Request],
    batches: Iterable[tuple[Any, ...]],
    *,
    progress: bool = False,
) -> Statistics:
    """Runs the float graph once over the batches, up to the last node that is asked for.

    Everything is summed in float64 unless a request says otherwise; memory does not grow with the number of batches.
    Under torch.distributed (gloo or nccl) every rank gives its own batches (see `shard`) and the same requests, and
    gets the statistics of all; a rank may have none.

    Args:
        module: captured float graph.
        requests: values to look at, states of scans (see `probe`) and gradients (see `gradients`) among them; several
            requests for one node are united. Without any, nothing is run. For gradients every batch runs twice.
        batches: positional inputs of the graph, one tuple a batch. A generator is read once.
        progress: show a progress bar on stderr.

    Returns:
        The statistics of every requested node.

    Raises:
        MqAoError: no batch or no token on any rank, an unknown node, one that is no floating tensor or whose channels
            change, NaN or Inf, which is named, a batch that does not fit the graph, or a failure on another rank.
    """
    accumulators = _accumulators(requests)
    if not accumulators:
        return Statistics({})
    # All ranks must reduce in one order.
    pooled = list(accumulators.values())
    try:
        _run(with_states(module, accumulators), accumulators, batches, progress)
    except Exception:
        if is_distributed():
            report_failure(pooled)
        raise
    if is_distributed():
        reduce(pooled)
    if any(item.count == 0 for item in pooled):
        raise MqAoError("calibration is empty: give at least one batch of inputs, with at least one token.")
    logger.info("statistics of %d nodes over %d tokens", len(pooled), pooled[0].count)
    return Statistics({name: _statistics(item) for name, item in accumulators.items()})


def shard(
    batches: Iterable[tuple[Any, ...]], rank: int | None = None, world_size: int | None = None
) -> Iterator[tuple[Any, ...]]:
    """Yields this rank's share: every `world_size`-th batch, from number `rank` on.

    Args:
        batches: the same batches on every rank.
        rank: defaults to that of torch.distributed, 0 where it does not run.
        world_size: defaults likewise, to 1.

    Raises:
        MqAoError: the rank does not lie within the world.
    """
    rank = rank if rank is not None else dist.get_rank() if is_distributed() else 0
    world_size = world_size if world_size is not None else dist.get_world_size() if is_distributed() else 1
    if not 0 <= rank < world_size:
        raise MqAoError(f"rank {rank} does not lie within a world of {world_size}.")
    return itertools.islice(batches, rank, None, world_size)


def _accumulators(requests: Iterable[Request]) -> dict[str, Accumulator]:
    united: dict[str, Request] = {}
    for request in requests:
        united[request.node] = request | united.get(request.node, request)
    return {
        name: Accumulator(covariance=request.covariance, quantiles=request.quantiles, precision=request.precision)
        for name, request in sorted(united.items())
    }


def _run(
    module: GraphModule, accumulators: Mapping[str, Accumulator], batches: Iterable[tuple[Any, ...]], progress: bool
) -> None:
    gradients = GradientRun(module, accumulators)
    watch = _Watch(module, {name: item for name, item in accumulators.items() if name not in gradients.names})
    for batch in with_bar(batches, "collecting statistics", progress):
        watch.run_batch(batch)
        if gradients.names:
            gradients.run_batch(batch)
    for item in accumulators.values():
        if item.channels:
            item.finish()


class _Watch(PartialRun):
    """Runs a graph up to the last value that is looked at, and adds such values up as they come."""

    def __init__(self, module: GraphModule, accumulators: Mapping[str, Accumulator]) -> None:
        nodes = {node.name: node for node in module.graph.nodes}
        unknown = [name for name in accumulators if name not in nodes]
        if unknown:
            raise MqAoError(f"the graph has no node {', '.join(unknown)}: ask for statistics of nodes that it has.")
        super().__init__(module, [nodes[name] for name in accumulators])
        self._accumulators = accumulators

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._accumulators:
            path = module_path(n)
            self._accumulators[n.name].update(value, f"{n.name} in {path}" if path else n.name)
        return value


def _statistics(item: Accumulator) -> ChannelStatistics:
    return ChannelStatistics(item.count, item.low, item.high, item.total, item.squares, item.moments, item.histogram)
