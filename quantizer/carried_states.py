"""Carried states: what a graph takes as an input and gives back, updated, as an output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from mq_ao.graph import Rejection, walk
from mq_ao.graph.views import Scan

aten = walk.aten
# Nothing that casts or computes: these take integers as well as floats.
_MOVES = frozenset({aten.select.int, aten.stack.default, aten.squeeze.dim, aten.unsqueeze.default})


@dataclass(frozen=True)
class CarriedState:
    """Where the state of one scan enters and leaves a graph.

    Attributes:
        source: input of the graph that holds it, perhaps with the states of other scans.
        initial: the scan's initial state.
        last: the scan's state after the last step.
    """

    source: Node
    initial: Node
    last: Node


def carried_states(scans: Iterable[Node]) -> dict[Node, CarriedState | Rejection]:
    """Where the states of scans, all of which are to be carried as integers, enter and leave; or why one cannot be.

    One graph input has one dtype: it holds integers only if everything that reads it takes them.
    """
    found = {scan: _carried_state(scan) for scan in scans}
    whole = {scan for scan, state in found.items() if isinstance(state, CarriedState)}
    result = dict(found)
    for scan, state in found.items():
        if isinstance(state, CarriedState):
            others = [user for user in _readers(state.source) if user not in whole]
            if others:
                reason = f"{others[0].name} reads the graph input {state.source.name} in float"
                result[scan] = Rejection(scan.name, reason)
    return result


def _carried_state(scan: Node) -> CarriedState | Rejection:
    if scan.target in walk.SSD:
        return Rejection(scan.name, "Mamba-2's states are carried in float32")
    if scan.target not in walk.SCAN:
        return Rejection(scan.name, "its states are nodes of their own, which are computed in float")
    initial = Scan.of(scan).initial_state
    source = None if initial is None else walk.upstream(initial, through=_MOVES)
    if initial is None or source is None or source.op != "placeholder":
        return Rejection(scan.name, "its initial state is not an input of the graph")
    last = walk.result(scan, 1)
    if last is None or {user.op for user in walk.downstream(last, through=_MOVES)} != {"output"}:
        return Rejection(scan.name, "its last state is not just an output of the graph")
    return CarriedState(source, initial, last)


def _readers(source: Node) -> list[Node]:
    """What reads the values of a graph input."""
    return [user for user in walk.downstream(source, through=_MOVES) if user.target != aten.sym_size.int]
