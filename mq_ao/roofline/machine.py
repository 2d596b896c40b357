"""The peaks of the CPU that this runs on, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mq_ao.ops.packing import linear_prepack

_SECONDS = 0.5
"""Of each of the four measurements."""
_BYTES = 256 << 20
"""Read at once: more than caches hold."""
_ROWS, _INPUTS, _OUTPUTS = 1024, 768, 3072
"""in_proj of mamba-130m, at 1024 tokens."""


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches with the threads that PyTorch may use.

    Attributes:
        bandwidth: bytes a second that are read from memory.
        int8: operations a second of products of int8 matrices, multiplications and additions: the better one of our
            kernel and `torch._int_mm`.
        fp32: the same of float32 matrices.
    """

    bandwidth: float
    int8: float
    fp32: float


def measure() -> Peaks:
    """Measures for about two seconds; the best of many repetitions counts."""
    large = torch.zeros(_BYTES // 4)
    x, weight = torch.ones(_ROWS, _INPUTS), torch.ones(_INPUTS, _OUTPUTS)
    signed = torch.ones(_ROWS, _INPUTS, dtype=torch.int8), torch.ones(_OUTPUTS, _INPUTS, dtype=torch.int8)
    linear = partial(
        torch.ops.mq_ao.linear_packed,
        *(torch.ones(_ROWS, _INPUTS, dtype=torch.uint8), 1.0, 0, linear_prepack(signed[1]), torch.ones(_OUTPUTS)),
    )
    operations = 2 * _ROWS * _INPUTS * _OUTPUTS
    return Peaks(
        bandwidth=_BYTES / _best(large.sum),
        int8=operations / min(_best(linear), _best(partial(torch._int_mm, signed[0], signed[1].t()))),
        fp32=operations / _best(partial(torch.mm, x, weight)),
    )


def _best(run: Callable[[], object]) -> float:
    """The shortest time of a call."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
