"""Channel statistics of a float graph, for smoothing and rotation (docs/method.md, sections 2 and 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.statistics.accumulators import BINS, BINS_PER_OCTAVE, bin_centres


@dataclass(frozen=True)
class Request:
    """What to collect of one value of the graph, along its last axis. Extremes and sums are always collected.

    Attributes:
        node: name of the node whose output is looked at; a floating tensor (..., channels).
        covariance: also the second moments, channels x channels.
        quantiles: also a histogram of |x| per channel.
        precision: dtype in which second moments are formed and kept; float32 takes half the memory and time.
    """

    node: str
    covariance: bool = False
    quantiles: bool = False
    precision: torch.dtype = torch.float64

    def __or__(self, other: Request) -> Request:
        """What either of two requests for the same node asks for.

        Raises:
            MqAoError: the nodes differ.
        """
        if self.node != other.node:
            raise MqAoError(f"requests for {self.node} and {other.node} cannot be united: they name different nodes.")
        return Request(
            self.node,
            self.covariance or other.covariance,
            self.quantiles or other.quantiles,
            torch.promote_types(self.precision, other.precision),
        )


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Statistics of the rows (tokens) of one value, X (count, channels).

    All tensors are float64 on the CPU, but for moments that were asked for in float32.

    Attributes:
        count: number of rows.
        low: minimum of each channel, (channels,); None if not known, which is so after a rotation.
        high: maximum of each channel, (channels,); None with `low`.
        total: sum of each channel, (channels,).
        squares: sum of squares of each channel, (channels,).
        moments: X^T X, not centred, (channels, channels), or None if not collected.
        histogram: counts of |x|, (channels, bins), 8 bins an octave from 2**-40 to 2**40 and one at either end for
            the rest; None if not collected, or after a rotation.
    """

    count: int
    low: Tensor | None
    high: Tensor | None
    total: Tensor
    squares: Tensor
    moments: Tensor | None = None
    histogram: Tensor | None = None

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.total.shape[0]

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """`low` and `high`, each (channels,).

        Raises:
            MqAoError: they are not known.
        """
        if self.low is None or self.high is None:
            raise MqAoError("extremes are not known after a rotation: take them before it, or collect again.")
        return self.low, self.high

    @property
    def maximum(self) -> Tensor:
        """Largest |x| of each channel, (channels,).

        Raises:
            MqAoError: the extremes are not known.
        """
        low, high = self.extremes
        return torch.maximum(low.abs(), high.abs())

    @property
    def power(self) -> Tensor:
        """Root mean square of each channel, (channels,)."""
        return (self.squares / self.count).sqrt()

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (channels,)."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of each channel, (channels,).

        Raises:
            MqAoError: fewer than two rows.
        """
        centred = self.squares - self.total.square() / self.count
        # A constant channel may come out below zero by rounding.
        return centred.clamp(min=0) / self._degrees()

    def copies(self, width: int) -> list[ChannelStatistics]:
        """Statistics of each part of rows in which so many channels lie several times, side by side."""
        if width == self.channels:
            return [self]
        parts = [slice(start, start + width) for start in range(0, self.channels, width)]
        return [
            ChannelStatistics(
                self.count,
                None if self.low is None else self.low[part],
                None if self.high is None else self.high[part],
                self.total[part],
                self.squares[part],
                None if self.moments is None else self.moments[part, part],
                None if self.histogram is None else self.histogram[part],
            )
            for part in parts
        ]

    def covariance(self) -> Tensor:
        """C_X of docs/method.md, section 3: X^T X / (count - 1) of the centred X, (channels, channels).

        Raises:
            MqAoError: it was not collected, or fewer than two rows.
        """
        return (self._known_moments() - torch.outer(self.total, self.total) / self.count) / self._degrees()

    @property
    def enough_for_covariance(self) -> bool:
        """Whether there are at least 4 rows a channel; with fewer, eigenvectors follow the noise of the sample."""
        return self.count >= 4 * self.channels

    def quantile(self, q: float) -> Tensor:
        """Value that a fraction `q` of each channel's |x| does not exceed, (channels,).

        It is the centre of a logarithmic bin, or `maximum` where that is smaller: the relative error is at most
        2**(1/16) - 1 = 4.4 %. Values below 2**-40 count as 0, and a quantile above 2**40 or for `q` 1 is `maximum`.

        Raises:
            MqAoError: the histogram was not collected or is not known, or `q` is not within 0..1.
        """
        if self.histogram is None:
            raise MqAoError("quantiles are not known: collect them with Request(quantiles=True), before any rotation.")
        if not 0 <= q <= 1:
            raise MqAoError(f"quantile {q} does not lie within 0..1.")
        if q == 1:
            return self.maximum
        wanted = torch.full((self.channels, 1), max(q * self.count, 1), dtype=torch.float64)
        index = torch.searchsorted(self.histogram.cumsum(1), wanted).squeeze(1)
        return torch.minimum(bin_centres()[index], self.maximum)

    def scaled(self, s: Tensor) -> ChannelStatistics:
        """Statistics of x * s. Exact, but for the histogram.

        The histogram moves by whole bins, to the nearest: each call adds up to 2**(1/16) - 1 = 4.4 % to the relative
        error of quantiles, and nothing for powers of 2**(1/8).

        Args:
            s: positive factors, (channels,).

        Raises:
            MqAoError: a factor is not positive and finite, or their number is wrong.
        """
        s = s.detach().to("cpu", torch.float64)
        if s.shape != (self.channels,) or not (s.isfinite() & (s > 0)).all():
            raise MqAoError(f"statistics of {self.channels} channels are scaled by as many positive, finite factors.")
        return ChannelStatistics(
            count=self.count,
            low=None if self.low is None else self.low * s,
            high=None if self.high is None else self.high * s,
            total=self.total * s,
            squares=self.squares * s.square(),
            moments=None if self.moments is None else self.moments * torch.outer(s, s),
            histogram=None if self.histogram is None else _shifted(self.histogram, s),
        )

    def rotated(self, R: Tensor) -> ChannelStatistics:
        """Statistics of x @ R: sums and moments exactly; extremes and histogram are not known.

        Args:
            R: (channels, new channels), orthogonal or not.

        Raises:
            MqAoError: the moments were not collected, or the shape is wrong.
        """
        R = R.detach().to("cpu", torch.float64)
        if R.dim() != 2 or R.shape[0] != self.channels:
            raise MqAoError(f"a matrix {tuple(R.shape)} does not rotate {self.channels} channels.")
        moments = R.T @ self._known_moments() @ R
        return ChannelStatistics(self.count, None, None, self.total @ R, moments.diagonal().clone(), moments, None)

    def selected(self, start: int, stop: int) -> ChannelStatistics:
        """Statistics of the channels start..stop, `stop` excluded.

        Raises:
            MqAoError: the range is empty or goes beyond the channels.
        """
        if not 0 <= start < stop <= self.channels:
            raise MqAoError(f"there are no channels {start}..{stop} among {self.channels}.")
        part = slice(start, stop)
        return replace(
            self,
            low=None if self.low is None else self.low[part],
            high=None if self.high is None else self.high[part],
            total=self.total[part],
            squares=self.squares[part],
            moments=None if self.moments is None else self.moments[part, part],
            histogram=None if self.histogram is None else self.histogram[part],
        )

    def merged(self, other: ChannelStatistics) -> ChannelStatistics:
        """Statistics of the rows of both; what either does not know, the result does not know.

        Raises:
            MqAoError: the numbers of channels differ.
        """
        if self.channels != other.channels:
            raise MqAoError(f"statistics of {self.channels} and {other.channels} channels cannot be pooled.")
        return ChannelStatistics(
            count=self.count + other.count,
            low=None if self.low is None or other.low is None else torch.minimum(self.low, other.low),
            high=None if self.high is None or other.high is None else torch.maximum(self.high, other.high),
            total=self.total + other.total,
            squares=self.squares + other.squares,
            moments=None if self.moments is None or other.moments is None else self.moments + other.moments,
            histogram=None if self.histogram is None or other.histogram is None else self.histogram + other.histogram,
        )

    def _degrees(self) -> int:
        if self.count < 2:
            raise MqAoError("a variance needs at least two tokens: give more calibration data.")
        return self.count - 1

    def _known_moments(self) -> Tensor:
        if self.moments is None:
            raise MqAoError("second moments were not collected: ask for them with Request(covariance=True).")
        return self.moments


class Statistics(Mapping[str, ChannelStatistics]):
    """Statistics by node name. Immutable."""

    def __init__(self, values: Mapping[str, ChannelStatistics]) -> None:
        self._values = MappingProxyType(dict(values))

    def __getitem__(self, name: str) -> ChannelStatistics:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def replaced(self, name: str, stats: ChannelStatistics) -> Statistics:
        """A copy in which the node `name`, known or new, has these statistics."""
        return Statistics({**self._values, name: stats})


def _shifted(histogram: Tensor, s: Tensor) -> Tensor:
    """Moves each channel's counts by log2(s), to the nearest bin; what leaves the range stays in the outermost bins."""
    last = BINS - 1
    bins = torch.arange(BINS)
    index = (bins + (s.log2() * BINS_PER_OCTAVE).round().long()[:, None]).clamp(0, last)
    # The outermost bins hold zeros and unknown values, which do not come back into the range.
    index[:, 0], index[:, last] = 0, last
    return torch.zeros_like(histogram).scatter_add_(1, index, histogram)
