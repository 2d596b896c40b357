"""Bootstrap intervals of ratios of sums, over pieces of text and draws of calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy
from numpy.typing import NDArray

from mq_ao.errors import MqAoError

LEVEL = 0.95
"""Share of cases in which an interval is to hold the true value."""
_REPLICATES = 4000
_AT_ONCE = 2**22
"""Numbers in a block of replicates: 32 MiB."""

Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its interval.

    Attributes:
        value: the estimate from all data.
        low: lower end of the interval of `LEVEL`.
        high: its upper end.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain dictionary for JSON."""
        return asdict(self)


def ratio(sums: Array, weights: Array) -> Estimate:
    """The ratio of two totals, with a percentile interval of the bootstrap.

    Pieces of text and draws of calibration data are resampled independently of each other (Owen, The pigeonhole
    bootstrap, 2007), which counts noise that both share more than once rather than too little. Of n pieces or draws
    n - 1 are taken with replacement, so that variances are right for small n too (Rao and Wu, 1988). With one draw
    only text is resampled, and the interval says nothing of calibration.

    The seed is fixed: equal data give equal intervals, and those of several recipes on one text are paired.

    Args:
        sums: (pieces, draws), what is summed up over each piece.
        weights: (pieces,), what the total is divided by, such as tokens; positive.

    Raises:
        MqAoError: there are fewer than two pieces.
    """
    pieces, draws = sums.shape
    if pieces < 2:
        raise MqAoError("an interval needs two pieces of text at least: give a longer text.")
    totals = sums.mean(1).sum() / weights.sum()
    replicates = numpy.concatenate(
        [((ours @ sums) * theirs).sum(1) / (ours @ weights) for ours, theirs in _resampled(pieces, draws)]
    )
    low, high = numpy.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(totals), float(low), float(high))


def _resampled(pieces: int, draws: int) -> Iterator[tuple[Array, Array]]:
    """Blocks of replicates: how often each piece is taken (replicates, pieces), and each draw's share of 1."""
    generator = numpy.random.default_rng(0)
    size = max(1, _AT_ONCE // pieces)
    for start in range(0, _REPLICATES, size):
        count = min(size, _REPLICATES - start)
        shares = _taken(generator, count, draws) / (draws - 1) if draws > 1 else numpy.ones((count, 1))
        yield _taken(generator, count, pieces), shares


def _taken(generator: numpy.random.Generator, count: int, size: int) -> Array:
    """How often each of `size` things is taken in `size` - 1 choices with replacement, (count, size)."""
    chosen = generator.integers(0, size, (count, size - 1)) + size * numpy.arange(count)[:, None]
    return numpy.bincount(chosen.ravel(), minlength=count * size).reshape(count, size).astype(float)
