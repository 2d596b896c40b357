"""Times the scan kernel against a matrix product of the same layer, in turns, so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mq_ao import ops
from mq_ao.errors import MqAoError

LENGTH, D_MODEL, D_INNER, D_STATE = 1024, 768, 1536, 16
"""Shapes of a layer of mamba-130m at 1024 tokens."""


@dataclass(frozen=True)
class KernelTimes:
    """Median times in milliseconds.

    Attributes:
        scan_ms: `mq_ao::selective_scan` in float32, with softplus, bias and D.
        int_mm_ms: `torch._int_mm` of the block's in_proj, int8.
        ratio: median of the ratios of neighbouring pairs.
    """

    scan_ms: float
    int_mm_ms: float
    ratio: float


def measure_scan(pairs: int = 31) -> KernelTimes:
    """Times the scan and one `torch._int_mm` of (1024 x 768) by (768 x 3072), `pairs` times in turns.

    Raises:
        MqAoError: the native kernels cannot be built.
    """
    if not ops.load_native():
        raise MqAoError("there are no native kernels to measure: run `mq-ao build-kernels` and mend what it says.")
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    def int8(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=gen)

    A = -torch.arange(1, D_STATE + 1, dtype=torch.float32).repeat(D_INNER, 1)
    operands = (
        normal(1, LENGTH, D_INNER),
        normal(1, LENGTH, D_INNER) - 4,
        A,
        normal(1, LENGTH, D_STATE),
        normal(1, LENGTH, D_STATE),
        normal(D_INNER),
        normal(D_INNER),
        True,
    )
    a, b = int8(LENGTH, D_MODEL), int8(D_MODEL, 2 * D_INNER)
    with torch.inference_mode():
        times = [
            (_milliseconds(torch.ops.mq_ao.selective_scan, *operands), _milliseconds(torch._int_mm, a, b))
            for _ in range(pairs + 2)
        ][2:]  # the first calls also start threads and touch memory
    return KernelTimes(
        scan_ms=statistics.median(scan for scan, _ in times),
        int_mm_ms=statistics.median(product for _, product in times),
        ratio=statistics.median(scan / product for scan, product in times),
    )


def _milliseconds(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return (time.perf_counter() - start) * 1e3
