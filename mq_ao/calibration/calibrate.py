"""Runs calibration data through a prepared graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase, ObserverBase

from mq_ao.errors import MqAoError
from mq_ao.graph.partial import Batch, PartialRun
from mq_ao.memory import release
from mq_ao.progress import with_bar

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(prepared: GraphModule, batches: Iterable[tuple[Any, ...]], *, progress: bool = False) -> int:
    """Runs every batch through the prepared graph.

    Args:
        prepared: result of `prepare_pt2e`.
        batches: positional inputs of the graph, one tuple a batch.
        progress: show a progress bar on stderr.

    Returns:
        Number of batches; parts of one count once (see `graph.partial.Batch`).

    Raises:
        MqAoError: no batch, one that does not fit the graph, or NaN or Inf on the way, whose node and batch are named.
    """
    observers = _observers(prepared)
    run = PartialRun(prepared, observers).run_batch if observers else None
    numbers: set[int] = set()
    for batch in with_bar(batches, "calibrating", progress):
        if run is not None:
            run(batch)
        numbers.add(batch.number if isinstance(batch, Batch) else len(numbers))
        release()
    if not numbers:
        raise MqAoError("calibration is empty: give at least one batch of inputs.")
    logger.info("calibrated on %d batches", len(numbers))
    return len(numbers)


def _observers(prepared: GraphModule) -> dict[Node, torch.nn.Module]:
    """The observers of activations, by their nodes."""
    found: dict[Node, torch.nn.Module] = {}
    for node in prepared.graph.nodes:
        # Weights were checked once, before capture.
        if node.op == "call_module" and isinstance(node.args[0], Node) and node.args[0].op != "get_attr":
            observer = prepared.get_submodule(node.target)
            if isinstance(observer, ObserverBase | AffineQuantizedObserverBase):
                found[node] = observer
    return found
