"""Exact float rewrites of METHOD.md, applied between capture and `prepare_pt2e`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch.fx import GraphModule

from mq_ao.errors import MqAoError

Pass = Callable[[GraphModule], GraphModule]

PASSES: Mapping[str, Pass] = MappingProxyType({})
"""Rewrites by name. None is registered yet: `rtn` recipes need none."""


def apply(module: GraphModule, names: Sequence[str]) -> GraphModule:
    """Applies the named rewrites in order.

    Raises:
        MqAoError: a name is unknown.
    """
    for name in names:
        if name not in PASSES:
            known = ", ".join(PASSES) or "none yet"
            raise MqAoError(f"unknown pass {name!r}: the passes are {known}.")
        module = PASSES[name](module)
    return module
