"""Times of single calls on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from mq_ao.bench.gpu import wait


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of calls that are waited for, after one that is not counted: for what takes longer than a launch."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def kernel_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a kernel's launches, each with a cold second-level cache; interpreted, of one call."""
    if device.type != "cuda":
        return median_seconds(call, device, 1)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3
