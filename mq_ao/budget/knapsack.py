"""The multiple-choice knapsack, solved exactly: every choice of one item a site that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from mq_ao.errors import MqAoError

_MOST = 2**18
"""Choices kept at once; beyond that sizes are rounded up, so that the result is feasible and nearly optimal."""


@dataclass(frozen=True)
class Item:
    """One of a site's alternatives.

    Attributes:
        size: in bytes, at least 0.
        loss: what it adds; below 0 where it is better than what losses are counted from.
    """

    size: int
    loss: float


@dataclass(frozen=True)
class Point:
    """A choice of one item a site.

    Attributes:
        size: sum over its items, in bytes.
        loss: sum over its items.
        chosen: index of each site's item.
    """

    size: int
    loss: float
    chosen: tuple[int, ...]


def pareto_front(sites: Sequence[Sequence[Item]]) -> list[Point]:
    """All points that are not beaten: none is as small and loses less, or loses as much and is smaller.

    Dynamic programming over the sites that keeps what is not beaten so far (Nemhauser and Ullmann, 1969). It is exact
    up to 262144 points; beyond, sizes are rounded up to a coarser unit on the way.

    Args:
        sites: the items of each site, at least one.

    Returns:
        The points, by increasing size and decreasing loss.

    Raises:
        MqAoError: a site has no item.
    """
    if not all(sites):
        raise MqAoError("a site has nothing to choose from: give at least one item a site.")
    # Keys order and prune; they are the sizes unless these are too many.
    keys, losses, unit = numpy.zeros(1, numpy.int64), numpy.zeros(1), 1
    steps: list[tuple[numpy.ndarray, numpy.ndarray]] = []
    for items in sites:
        added = numpy.array([-(-item.size // unit) for item in items], numpy.int64)
        sums = (keys[:, None] + added).ravel()
        totals = (losses[:, None] + numpy.array([item.loss for item in items])).ravel()
        kept = _unbeaten(sums, totals)
        while len(kept) > _MOST:
            unit, sums = 2 * unit, -(-sums // 2)
            kept = _unbeaten(sums, totals)
        keys, losses = sums[kept], totals[kept]
        steps.append((kept // len(items), kept % len(items)))
    points = []
    for index in range(len(keys)):
        chosen, at = [], index
        for before, item in reversed(steps):
            chosen.append(int(item[at]))
            at = int(before[at])
        chosen.reverse()
        size = sum(items[one].size for items, one in zip(sites, chosen, strict=True))
        points.append(Point(size, float(losses[index]), tuple(chosen)))
    return points


def _unbeaten(sizes: numpy.ndarray, losses: numpy.ndarray) -> numpy.ndarray:
    """Indices of what is not beaten, by increasing size."""
    order = numpy.lexsort((losses, sizes))
    least = numpy.minimum.accumulate(losses[order])
    first = numpy.concatenate(([True], least[1:] < least[:-1]))
    found: numpy.ndarray = order[first]
    return found
