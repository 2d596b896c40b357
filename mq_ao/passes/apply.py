"""Runs passes over a float graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import GraphModule

from mq_ao.errors import MqAoError
from mq_ao.passes.base import Pass, Rewrite
from mq_ao.passes.order import check_order
from mq_ao.passes.registry import parse_pass
from mq_ao.statistics import Request, collect
from mq_ao.turns import in_turn

logger = logging.getLogger(__name__)

_APPLIED = "mq_ao_passes"


@in_turn
def apply(
    module: GraphModule,
    passes: Sequence[Pass | str],
    batches: Iterable[tuple[Any, ...]] = (),
    *,
    progress: bool = False,
) -> Rewrite:
    """Applies exact rewrites in order. Statistics are collected in one run over the float graph.

    Passes at the front that need no statistics, such as `fold_norm`, are applied before that run.

    Args:
        module: float graph (`ExportedProgram.module()`); it is edited in place, its parameters are replaced.
        passes: passes or their names.
        batches: calibration data, positional inputs of the graph; read once, and only if a pass needs statistics.
        progress: show a progress bar on stderr.

    Returns:
        The rewritten graph, what was done to it, and the statistics as they are after it.

    Raises:
        MqAoError: an unknown pass, one that was applied to this graph before, passes that do not go together in this
            order (see `check_order`), or bad calibration data.
    """
    rewrite, waiting = Rewrite(module), [parse_pass(item) for item in passes]
    applied: list[str] = module.meta.setdefault(_APPLIED, [])
    names = [item.name for item in waiting]
    if again := next((name for name in names if name in applied), None):
        raise MqAoError(f"pass {again} was applied to this graph before: capture the model again.")
    check_order([*applied, *names])
    while waiting and not list(waiting[0].requests(rewrite)):
        _apply(rewrite, waiting.pop(0), applied)
    requests: dict[str, Request] = {}
    for item in waiting:
        for request in item.requests(rewrite):
            requests[request.node] = requests.get(request.node, request) | request
    if requests:
        rewrite.statistics = dict(collect(module, requests.values(), batches, progress=progress))
    for item in waiting:
        _apply(rewrite, item, applied)
    module.graph.lint()
    module.recompile()
    return rewrite


def _apply(rewrite: Rewrite, item: Pass, applied: list[str]) -> None:
    before = len(rewrite.transforms)
    item.apply(rewrite)
    applied.append(item.name)
    for transform in rewrite.transforms[before:]:
        logger.info("%s", transform)
