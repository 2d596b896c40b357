"""Which output channels of a linear a value holds: slices of in_proj and x_proj."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.fx import Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk

aten = walk.aten


@dataclass(frozen=True)
class Rows:
    """Output channels [start, stop) of a linear.

    Attributes:
        linear: the linear.
        start: first channel.
        stop: one past the last.
    """

    linear: Node
    start: int
    stop: int

    @property
    def slice(self) -> slice:
        """Index of these rows in the linear's weight and bias."""
        return slice(self.start, self.stop)


def rows_of(node: Node) -> Rows:
    """Follows `node` up to the linear that computes it.

    Raises:
        MqAoError: something on the way is not a slice along the last axis.
    """
    if node.target in walk.LINEAR:
        return Rows(node, 0, int(node.meta["val"].shape[-1]))
    source = node.args[0] if node.args else None
    if isinstance(source, Node):
        if node.target in walk.COPYING:
            return rows_of(source)
        if node.target is operator.getitem:
            piece = _piece(source, node.args[1])
            if piece is not None:
                return _within(rows_of(walk.argument(source, 0)), *piece)
        if node.target == aten.slice.Tensor and _is_last(source, node.args[1] if len(node.args) > 1 else 0):
            start, stop, step = [*node.args[2:], *[None] * (5 - len(node.args))][:3]
            size = int(source.meta["val"].shape[-1])
            if step in (None, 1) and isinstance(start or 0, int) and isinstance(stop or size, int):
                begin, end, _ = slice(start, stop).indices(size)
                return _within(rows_of(source), begin, end)
    raise MqAoError(f"{node.name} is not a range of channels of a linear, so it cannot be scaled or rotated there.")


def piece_bounds(split: Node) -> list[tuple[int, int]] | None:
    """(start, stop) of every output of a split or chunk along the last axis, or None if `split` is none."""
    if split.target not in (aten.chunk.default, aten.split_with_sizes.default, aten.split.Tensor):
        return None
    source: Any = split.args[0]
    how: Any = split.args[1]
    if not _is_last(source, split.args[2] if len(split.args) > 2 else 0):
        return None
    width = int(source.meta["val"].shape[-1])
    if split.target == aten.split_with_sizes.default:
        sizes = list(how)
    else:
        size = -(-width // how) if split.target == aten.chunk.default else how
        sizes = [min(size, width - first) for first in range(0, width, size)]
    stops = list(accumulate(sizes))
    return list(zip([stop - size for stop, size in zip(stops, sizes, strict=True)], stops, strict=True))


def pieces(linear: Node) -> list[tuple[Node, int, int]] | None:
    """(value, start, stop) of every range of channels of a linear, if it is only read as such, else None."""
    split = walk.only_user(linear)
    bounds = None if split is None else piece_bounds(split)
    if split is None or bounds is None:
        return None
    indices: list[tuple[Node, Any]] = [(user, user.args[1]) for user in split.users]
    return [(user, *bounds[index]) for user, index in indices]


def _piece(split: Node, index: Any) -> tuple[int, int] | None:
    bounds = piece_bounds(split)
    return None if bounds is None else bounds[index]


def _is_last(source: Node, axis: Any) -> bool:
    return axis in (-1, source.meta["val"].dim() - 1)


def _within(outer: Rows, start: int, stop: int) -> Rows:
    return Rows(outer.linear, outer.start + start, outer.start + stop)
