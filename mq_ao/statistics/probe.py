"""A copy of a float graph that also computes what passes ask about, but the graph itself does not hold."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from mq_ao.graph import edit, walk
from mq_ao.graph.views import Scan

_SUFFIX, _FLAT_SUFFIX = "_states", "_flat_states"


def states_name(scan: Node) -> str:
    """Name of the node with all states h (batch, length, channels, d_state) of a scan in the probe."""
    return scan.name + _SUFFIX


def flat_states_name(scan: Node) -> str:
    """Name of the node with the same states as (batch, length, channels * d_state): one channel each in statistics."""
    return scan.name + _FLAT_SUFFIX


def with_states(module: GraphModule, names: Iterable[str]) -> GraphModule:
    """The graph with a `scan_states` node beside every scan whose states are among `names`; weights are shared."""
    wanted = set(names)
    if not _scans(module, wanted):
        return module
    probe = GraphModule(module, copy.deepcopy(module.graph))
    for scan in _scans(probe, wanted):
        with probe.graph.inserting_after(scan):
            states = edit.call(probe, torch.ops.mq_ao.scan_states.default, states_arguments(scan), like=scan)
        with probe.graph.inserting_after(states):
            h = probe.graph.call_function(walk.getitem, (states, 0))
        with probe.graph.inserting_after(h):
            flat = probe.graph.call_function(walk.aten.flatten.using_ints, (h, 2))
        h.name, flat.name = states_name(scan), flat_states_name(scan)
    probe.recompile()
    return probe


def _scans(module: GraphModule, wanted: set[str]) -> list[Node]:
    return [scan for scan in walk.calls(module, walk.SCAN) if {states_name(scan), flat_states_name(scan)} & wanted]


def states_arguments(node: Node) -> tuple[object, ...]:
    """Arguments of `scan_states` that equal a `selective_scan` node's."""
    scan = Scan.of(node)
    return scan.u, scan.delta, scan.a, scan.b, scan.bias, scan.softplus, scan.initial_state
