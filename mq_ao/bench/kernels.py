"""Times the scan kernels against a matrix product of the same layer, in turns, so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mq_ao import ops
from mq_ao.errors import MqAoError

LENGTH, D_MODEL, D_INNER = 1024, 768, 1536
"""Shapes of a layer of mamba-130m and of mamba2-130m, at 1024 tokens."""


@dataclass(frozen=True)
class Kernel:
    """A scan in float32, with softplus, bias and D.

    Attributes:
        name: the operator.
        shape: its sizes, for people.
        operands: draws its arguments.
        in_proj: output features of its block's in_proj.
    """

    name: str
    shape: str
    operands: Callable[[torch.Generator], tuple[object, ...]]
    in_proj: int


@dataclass(frozen=True)
class KernelTimes:
    """Median times in milliseconds.

    Attributes:
        scan_ms: the kernel.
        int_mm_ms: `torch._int_mm` of the block's in_proj, int8.
        ratio: median of the ratios of neighbouring pairs.
        recurrence_ms: the same recurrence in PyTorch, step by step (the operator's reference).
    """

    scan_ms: float
    int_mm_ms: float
    ratio: float
    recurrence_ms: float


def _selective_scan(gen: torch.Generator) -> tuple[object, ...]:
    d_state = 16
    rows, matrix = (1, LENGTH, D_INNER), (1, LENGTH, d_state)
    A = -torch.arange(1, d_state + 1, dtype=torch.float32).repeat(D_INNER, 1)
    u, delta = _normal(gen, *rows), _normal(gen, *rows) - 4
    B, C = _normal(gen, *matrix), _normal(gen, *matrix)
    return u, delta, A, B, C, _normal(gen, D_INNER), _normal(gen, D_INNER), True


def _ssd_scan(gen: torch.Generator) -> tuple[object, ...]:
    headdim, d_state = 64, 128
    heads = D_INNER // headdim
    matrix = (1, LENGTH, 1, d_state)
    A = -torch.linspace(1, 16, heads)
    x, dt = _normal(gen, 1, LENGTH, heads, headdim), _normal(gen, 1, LENGTH, heads) - 4
    B, C = _normal(gen, *matrix), _normal(gen, *matrix)
    return x, dt, A, B, C, _normal(gen, heads), _normal(gen, heads), True


def _normal(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen)


KERNELS = (
    Kernel("selective_scan", "1 x 1024 x 1536, d_state 16", _selective_scan, 2 * D_INNER),
    # z, x, B, C and dt of 24 heads.
    Kernel("ssd_scan", "1 x 1024 x 24 x 64, d_state 128", _ssd_scan, 2 * D_INNER + 2 * 128 + 24),
)


def measure(kernel: Kernel, pairs: int = 31, recurrences: int = 3) -> KernelTimes:
    """Times a scan and one `torch._int_mm` of its in_proj, `pairs` times in turns, then the plain recurrence.

    Raises:
        MqAoError: the native kernels cannot be built.
    """
    if not ops.load_native():
        raise MqAoError("there are no native kernels to measure: run `mq-ao build-kernels` and mend what it says.")
    gen = torch.Generator().manual_seed(0)
    operands = kernel.operands(gen)
    scan, recurrence = (getattr(torch.ops.mq_ao, name) for name in (kernel.name, f"{kernel.name}_reference"))
    a, b = (
        torch.randint(-128, 128, shape, dtype=torch.int8, generator=gen)
        for shape in ((LENGTH, D_MODEL), (D_MODEL, kernel.in_proj))
    )
    with torch.inference_mode():
        times = [(_milliseconds(scan, *operands), _milliseconds(torch._int_mm, a, b)) for _ in range(pairs + 2)][
            2:
        ]  # the first calls also start threads and touch memory
        slow = [_milliseconds(recurrence, *operands) for _ in range(recurrences)]
    return KernelTimes(
        scan_ms=statistics.median(scan for scan, _ in times),
        int_mm_ms=statistics.median(product for _, product in times),
        ratio=statistics.median(scan / product for scan, product in times),
        recurrence_ms=statistics.median(slow),
    )


def _milliseconds(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return (time.perf_counter() - start) * 1e3
