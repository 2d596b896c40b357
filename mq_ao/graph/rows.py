"""Which output channels of a linear a value holds: slices of in_proj and x_proj."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.fx import Node

from mq_ao.errors import Unsuitable
from mq_ao.graph import walk

aten = walk.aten

_SPLITS = frozenset({aten.chunk.default, aten.split_with_sizes.default, aten.split.Tensor})
_RESHAPES = frozenset(
    {
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.unflatten.int,
        aten.view.default,
    }
)


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

    def overlaps(self, other: Rows) -> bool:
        """Whether both have channels in common."""
        return self.linear is other.linear and self.start < other.stop and other.start < self.stop


def rows_of(node: Node, read_by: Collection[Node] = (), *, shift: bool = False) -> Rows:
    """Follows the channels of `node`, its last axis, up to the linear that computes them.

    Args:
        node: a value.
        read_by: who may read these channels; empty: it does not matter.
        shift: a constant is to be added to these channels, and not only a linear map of them to be changed: masks and
            zeros for padding are then in the way.

    Raises:
        Unsuitable: something on the way changes or mixes channels, or others read them too.
    """
    rows = _rows(node, node.meta["val"].dim() - 1, node, shift)
    if read_by:
        _check_readers(rows, read_by)
    return rows


def origin(value: Node) -> Node:
    """What computes a value whose channels, its last axis, were only moved since, all of them.

    Raises:
        Unsuitable: part of them was taken, or their axis is not to be told in a reshape.
    """
    node, axis = value, value.meta["val"].dim() - 1
    while node.op == "call_function" and node.target in walk.TRANSPARENT and node.target is not operator.getitem:
        source, found = walk.argument(node, 0), channel_source(node, axis)
        if found is None or found[1:] != (0, source.meta["val"].shape[found[0]]):
            raise Unsuitable(f"{node.name} changes which channels there are.")
        node, axis = source, found[0]
    if node.target is not operator.getitem and axis != node.meta["val"].dim() - 1:
        raise Unsuitable(f"the channels of {node.name} are not its last axis.")
    return node


def _rows(node: Node, axis: int, of: Node, shift: bool) -> Rows:
    """Rows of the linear behind `node`, whose channels lie on `axis`; `of` is what was asked about."""
    if node.target in walk.LINEAR and axis == node.meta["val"].dim() - 1:
        return Rows(node, 0, int(node.meta["val"].shape[-1]))
    source = node.args[0] if node.args else None
    if shift and walk.is_tokenwise(node):
        raise Unsuitable(f"{of.name} is masked or padded by {node.name}, and a shift before that is not one behind it.")
    if isinstance(source, Node):
        if node.target is operator.getitem:
            source = walk.argument(source, 0)
        found = channel_source(node, axis)
        if found is not None:
            inner, start, stop = found
            return _within(_rows(source, inner, of, shift), start, stop)
    raise Unsuitable(f"{of.name} is not a range of channels of a linear, so it cannot be scaled or rotated there.")


def channel_source(node: Node, axis: int) -> tuple[int, int, int] | None:
    """Where the channels of a node that moves values come from.

    Args:
        node: call of an operator.
        axis: which axis of its value, not negative, the channels lie on.

    Returns:
        (axis of its input, first channel there, one past the last), or None where channels are mixed or changed.
    """
    size = node.meta["val"].shape[axis]
    if not isinstance(size, int) or not isinstance(node.args[0], Node):
        return None  # Sizes that vary are no channels.
    if node.target is operator.getitem:
        return _piece(node, axis)
    source = walk.argument(node, 0).meta["val"]
    whole = (axis, 0, size)
    if walk.is_tokenwise(node):
        return whole if axis == source.dim() - 1 else None
    if node.target in walk.COPYING or node.target == aten.expand.default:
        return whole if source.dim() == node.meta["val"].dim() else None
    if node.target in _RESHAPES:
        return _reshaped(source.shape, node.meta["val"].shape, axis)
    if node.target == aten.slice.Tensor:
        return _sliced(node, axis)
    moved = _moved(node, axis, source.dim()) if node.target in walk.TRANSPARENT else None
    return None if moved is None else (moved, 0, size)


def _moved(node: Node, axis: int, dims: int) -> int | None:
    """The axis of the input, which has `dims` of them, that is `axis` of the output, if one is as it is."""
    given = walk.arguments(node)
    if node.target == aten.flip.default:
        return None if axis in _positive(given["dims"], dims) else axis
    if node.target == aten.index_select.default:
        return None if axis == given["dim"] % dims else axis
    if node.target == aten.permute.default:
        return _positive(given["dims"], dims)[axis]
    if node.target == aten.transpose.int:
        first, second = _positive((given["dim0"], given["dim1"]), dims)
        return {first: second, second: first}.get(axis, axis)
    if node.target == aten.select.int:
        return axis + (axis >= given["dim"] % dims)
    if node.target == aten.unsqueeze.default:
        added = given["dim"] % (dims + 1)
        return None if axis == added else axis - (axis > added)
    return None


def _piece(node: Node, axis: int) -> tuple[int, int, int] | None:
    split, index = walk.argument(node, 0), node.args[1]
    assert isinstance(index, int)
    size = walk.argument(split, 0).meta["val"].shape[axis] if split.target in _SPLITS else None
    if not isinstance(size, int):
        return None
    bounds = piece_bounds(split, axis)
    # Along another axis, a piece has all channels.
    return (axis, 0, size) if bounds is None else (axis, *bounds[index])


def _sliced(node: Node, axis: int) -> tuple[int, int, int] | None:
    x, dim, start, stop, step = walk.arguments(node).values()
    source = x.meta["val"]
    size = source.shape[axis]
    if not isinstance(size, int):
        return None
    if dim % source.dim() != axis:
        return axis, 0, size
    if step != 1 or not isinstance(start or 0, int) or not isinstance(stop or size, int):
        return None
    begin, end, _ = slice(start, stop).indices(size)
    return axis, begin, end


def _reshaped(source: Sequence[Any], target: Sequence[Any], axis: int) -> tuple[int, int, int] | None:
    """The axis of a reshape's input that is `axis` of its output, if that is one and the same axis."""
    size, behind = target[axis], math.prod(target[axis + 1 :])
    for candidate in range(len(source)):
        if walk.same_size(source[candidate], size) and walk.same_size(math.prod(source[candidate + 1 :]), behind):
            return candidate, 0, int(size)
    return None


def _check_readers(rows: Rows, read_by: Collection[Node]) -> None:
    """Raises Unsuitable if anything outside `read_by` reads some of these channels."""
    for reader in walk.downstream(rows.linear, tokenwise=True):
        for value in () if reader in read_by else reader.all_input_nodes:
            others = _around(value)
            if others is not None and others.overlaps(rows):
                raise Unsuitable(f"{reader.name} reads channels of {rows.linear.name} that would be changed.")


def _around(value: Node) -> Rows | None:
    """Channels of a linear that hold at least those of `value`, whose own axis may be lost in reshapes."""
    while True:
        try:
            return rows_of(value)
        except Unsuitable:
            if value.target not in walk.TRANSPARENT and not walk.is_tokenwise(value):
                return None
        source = walk.argument(value, 0)
        if value.target is operator.getitem:
            if source.target not in walk.TRANSPARENT:
                return None
            source = walk.argument(source, 0)
        value = source


def _positive(axes: Any, dim: int) -> list[int]:
    return [axis % dim for axis in axes]


def piece_bounds(split: Node, axis: int = -1) -> list[tuple[int, int]] | None:
    """(start, stop) of every output of a split or chunk along an axis, or None if `split` is none."""
    if split.target not in _SPLITS:
        return None
    x, how, dim = walk.arguments(split).values()
    source = x.meta["val"]
    if dim % source.dim() != axis % source.dim():
        return None
    width = source.shape[axis]
    if not isinstance(width, int):
        return None
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


def _within(outer: Rows, start: int, stop: int) -> Rows:
    return Rows(outer.linear, outer.start + start, outer.start + stop)
