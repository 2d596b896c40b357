"""Streaming float64 sums over the rows of activations, in one process or pooled over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mq_ao.errors import MqAoError

BINS_PER_OCTAVE = 8
OCTAVES = 40
BINS = 2 * OCTAVES * BINS_PER_OCTAVE + 2
"""Logarithmic bins from 2**-40 to 2**40; the first bin takes what is smaller (zeros too), the last what is larger."""

# From 2**15 elements on, torch shares an operation out to threads, which costs more than a block that lies in cache.
_CPU_BLOCK = 2**15 - 1
_DEVICE_BLOCK = 2**24
_PRODUCT_BLOCK = 2**20  # 8 MiB in float64: long enough for a matrix product to run at full speed
_PANELS = 4  # of X^T X, of which only the blocks on and above the diagonal are computed: 5/8 of the work
_BUCKET = 2**23  # elements of one all-reduce, 64 MiB


def bin_centres() -> Tensor:
    """Geometric centres of the bins, (BINS,) float64; 0 for the first and infinity for the last."""
    centres = torch.exp2((torch.arange(BINS, dtype=torch.float64) - 0.5) / BINS_PER_OCTAVE - OCTAVES)
    centres[0], centres[-1] = 0, torch.inf
    return centres


class Accumulator:
    """Statistics of one value, along its last axis, over any number of batches.

    Sums, and products unless `precision` says otherwise, are formed in float64 from blocks of rows: the square of a
    float32 is exact in float64, and no float64 copy of a whole activation exists. Tensors stay on the device of the
    value.

    Args:
        covariance: accumulate X^T X.
        quantiles: accumulate a histogram of |x| per channel.
        precision: dtype in which X^T X is formed.
    """

    def __init__(self, *, covariance: bool, quantiles: bool, precision: torch.dtype = torch.float64) -> None:
        self.covariance = covariance
        self.quantiles = quantiles
        self.precision = precision
        self.count = 0
        self.channels = 0
        """0 until the first row."""

    def start(self, channels: int, device: torch.device) -> None:
        """Allocates empty sums."""
        self.channels = channels
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        self.low, self.high = zeros + torch.inf, zeros - torch.inf
        self.total, self.squares = zeros, zeros.clone()
        self.moments = zeros.new_zeros(channels, channels, dtype=self.precision) if self.covariance else None
        self.histogram = zeros.new_zeros(channels, BINS) if self.quantiles else None

    def update(self, value: object, where: str) -> None:
        """Adds the rows of `value`.

        Args:
            value: tensor (..., channels), of any floating dtype and layout. It is not changed.
            where: what error messages call it.

        Raises:
            MqAoError: not a floating tensor, or another number of channels than before.
        """
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            raise MqAoError(f"node {where} has no floating-point channels: ask for statistics of another node.")
        if value.numel() == 0:
            return
        rows = value.reshape(-1, value.shape[-1])
        if self.channels == 0:
            self.start(rows.shape[1], rows.device)
        if rows.shape[1] != self.channels:
            raise MqAoError(
                f"node {where} had {self.channels} channels and now has {rows.shape[1]}: its last axis must be fixed."
            )
        self._add_extremes(rows)
        if self.moments is not None:
            self._add_products(rows, self.moments)
        else:
            self._add_sums(rows)
        if self.histogram is not None:
            self._add_counts(rows, self.histogram)
        self.count += rows.shape[0]

    def finish(self) -> None:
        """Moves the sums to the CPU and completes X^T X, of which `update` fills the upper panels only."""
        self.low, self.high = self.low.cpu(), self.high.cpu()
        self.total, self.squares = self.total.cpu(), self.squares.cpu()
        if self.moments is not None:
            moments = self.moments.cpu()
            self.moments = moments.triu_().add_(moments.triu(1).T)
            self.squares = self.moments.diagonal().clone().double()
        if self.histogram is not None:
            self.histogram = self.histogram.cpu()

    def _add_extremes(self, rows: Tensor) -> None:
        for block in _blocks(rows):
            self.low = torch.minimum(self.low, block.amin(0))
            self.high = torch.maximum(self.high, block.amax(0))

    def _add_sums(self, rows: Tensor) -> None:
        for block in _blocks(rows):
            exact = block.double()
            self.total += exact.sum(0)
            self.squares += exact.square().sum(0)

    def _add_products(self, rows: Tensor, moments: Tensor) -> None:
        width = -(-self.channels // _PANELS)
        for block in rows.split(max(1, _PRODUCT_BLOCK // self.channels)):
            exact = block.to(self.precision)
            self.total += exact.sum(0, dtype=torch.float64)
            for start in range(0, self.channels, width):
                panel = exact[:, start : start + width]
                moments[start : start + width, start:].addmm_(panel.T, exact[:, start:])

    def _add_counts(self, rows: Tensor, histogram: Tensor) -> None:
        middle = BINS // 2
        first = torch.arange(self.channels, device=rows.device) * BINS + middle
        one = histogram.new_ones(())
        for block in _blocks(rows):
            octaves = block.abs().float().log2_()
            index = octaves.mul_(BINS_PER_OCTAVE).floor_().clamp_(-middle, middle - 1).long() + first
            histogram.view(-1).scatter_add_(0, index.view(-1), one.expand(index.numel()))


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    size = _CPU_BLOCK if rows.device.type == "cpu" else _DEVICE_BLOCK
    return rows.split(max(1, size // rows.shape[1]))


def is_distributed() -> bool:
    """Whether torch.distributed runs."""
    return dist.is_available() and dist.is_initialized()


def report_failure(accumulators: Sequence[Accumulator]) -> None:
    """Tells the other ranks, which wait in `reduce`, that this one cannot go on; they raise."""
    _all_reduce([_header(accumulators, failed=True)], dist.ReduceOp.MAX)


def reduce(accumulators: Sequence[Accumulator]) -> None:
    """Pools finished accumulators over all ranks, on each of which the same ones must be given, in the same order.

    A rank that has seen no row takes part with zeros.

    Raises:
        MqAoError: on every rank, if one has called `report_failure` or if channels differ between ranks.
    """
    header = _header(accumulators, failed=False)
    _all_reduce([header], dist.ReduceOp.MAX)
    failed, widths = header[0].item(), header[1:].reshape(2, -1)
    if failed:
        raise MqAoError("another rank failed while it collected statistics: see its message.")
    seen = widths[0] > 0
    if not torch.equal(widths[0][seen], -widths[1][seen]):
        raise MqAoError("the ranks see different numbers of channels: run the same model on all of them.")
    used = [(item, int(width)) for item, width in zip(accumulators, widths[0], strict=True) if width > 0]
    for item, width in used:
        if item.channels == 0:
            item.start(width, torch.device("cpu"))
    _reduce_sums([item for item, _ in used])
    _reduce_extremes([item for item, _ in used])


def _header(accumulators: Sequence[Accumulator], *, failed: bool) -> Tensor:
    """A flag, the channels, and the channels negated: one maximum over the ranks gives both extremes."""
    widths = [item.channels for item in accumulators]
    return torch.tensor([failed, *widths, *(-width if width else -torch.inf for width in widths)], dtype=torch.float64)


def _reduce_sums(accumulators: Sequence[Accumulator]) -> None:
    counts = torch.tensor([item.count for item in accumulators], dtype=torch.float64)
    sums = [[item.total, item.squares, item.moments, item.histogram] for item in accumulators]
    _all_reduce([counts, *(x for parts in sums for x in parts if x is not None)], dist.ReduceOp.SUM)
    for item, count in zip(accumulators, counts, strict=True):
        item.count = int(count)


def _reduce_extremes(accumulators: Sequence[Accumulator]) -> None:
    for item in accumulators:
        item.low.neg_()
    _all_reduce([x for item in accumulators for x in (item.low, item.high)], dist.ReduceOp.MAX)
    for item in accumulators:
        item.low.neg_()


def _all_reduce(tensors: Sequence[Tensor], op: dist.ReduceOp.RedOpType) -> None:
    """Reduces CPU tensors in place, many in one call."""
    # nccl knows no tensors on the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(device)
        dist.all_reduce(flat, op)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
