"""What a reordered tensor is a view of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mq_ao.compat.tracing import statically_known_true

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class View:
    """A tensor as another one with its axes reordered and merged.

    Attributes:
        base: the other tensor.
        groups: for each axis of the view, the axes of `base` that it runs over, as in einops' "b l d -> d (b l)":
            ((2,), (0, 1)).
        product: (x, weight) if `base` is their linear, without a bias.
    """

    base: Tensor
    groups: Groups
    product: tuple[Tensor, Tensor] | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of `base` in the view's order."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def order(self) -> list[int]:
        """The axes of the view in the order of `base`, where none is merged."""
        return sorted(range(len(self.axes)), key=self.axes.__getitem__)

    @property
    def last(self) -> tuple[int, ...]:
        """The group of an axis that is the last axis of `base`."""
        return (self.base.dim() - 1,)


def identity(dims: int) -> Groups:
    return tuple((axis,) for axis in range(dims))


def merged(view: View, shape: Sequence[Any]) -> Groups | None:
    """Groups of a view after a reshape that merges whole axes or takes merged ones apart; None for any other."""
    base, axes = view.base, list(view.axes)
    if sum(isinstance(size, int) and size == -1 for size in shape) > 1:
        return None
    after = 0
    for size in reversed(shape):
        if isinstance(size, int) and size == -1:
            break
        after += 1
    back = _take(base, axes[::-1], list(shape)[::-1][:after])
    if back is None:
        return None
    if after == len(shape):
        return tuple(group[::-1] for group in reversed(back)) if sum(map(len, back)) == len(axes) else None
    tail = tuple(group[::-1] for group in reversed(back))
    axes = axes[: len(axes) - sum(map(len, back))]
    front = _take(base, axes, list(shape)[: len(shape) - after - 1])
    if front is None:
        return None
    return (*front, tuple(axes[sum(map(len, front)) :]), *tail)


def _take(base: Tensor, axes: Sequence[int], sizes: Sequence[Any]) -> list[tuple[int, ...]] | None:
    """Divides the first `axes` into groups of these sizes, in order."""
    groups, start = [], 0
    for size in sizes:
        stop, product = start, 1
        while not statically_known_true(product == size):
            if stop == len(axes):
                return None
            product = product * base.shape[axes[stop]]
            stop += 1
        groups.append(tuple(axes[start:stop]))
        start = stop
    return groups
