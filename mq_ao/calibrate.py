"""Runs calibration data through a prepared graph and watches for values that would poison the ranges."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase, ObserverBase

from mq_ao.errors import MqAoError
from mq_ao.graph.partial import PartialRun
from mq_ao.graph.walk import module_path
from mq_ao.memory import release

logger = logging.getLogger(__name__)


def check_weights(module: torch.nn.Module) -> None:
    """Checks that every parameter and buffer is finite.

    Raises:
        MqAoError: one is not; it is named.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # The extremes tell, without a temporary of the tensor's size.
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise MqAoError(f"weight {name} holds NaN or Inf: the checkpoint is broken, load another one.")


@torch.no_grad()
def calibrate(prepared: GraphModule, batches: Iterable[tuple[Any, ...]], *, progress: bool = False) -> int:
    """Runs every batch through the prepared graph.

    Args:
        prepared: result of `prepare_pt2e`.
        batches: positional inputs of the graph, one tuple a batch.
        progress: show a progress bar on stderr.

    Returns:
        Number of batches.

    Raises:
        MqAoError: no batch, or NaN or Inf reached an observed node, which is named.
    """
    observers = _observers(prepared)
    run = PartialRun(prepared, observers).run_batch if observers else None
    hooks = [observer.register_forward_pre_hook(_finite_check(node)) for node, observer in observers.items()]
    count = 0
    try:
        for batch in track(batches, "calibrating", disable=not progress, console=stderr(), transient=True):
            if run is not None:
                run(batch)
            count += 1
            release()
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise MqAoError("calibration is empty: give at least one batch of inputs.")
    logger.info("calibrated on %d batches", count)
    return count


def stderr() -> Any:
    """Console for progress bars."""
    from rich.console import Console

    return Console(stderr=True)


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


def _finite_check(observer: Node) -> Any:
    node = observer.args[0]
    assert isinstance(node, Node)
    where = f"{node.name} in {module_path(node)}" if module_path(node) else node.name

    def check(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # The extremes are finite if and only if everything is, and cost one pass without a mask.
        if not all(map(torch.isfinite, torch.aminmax(inputs[0]))):
            raise MqAoError(
                f"NaN or Inf at node {where} during calibration: check the weights and the inputs before it."
            )

    return check
