"""Sizes at which computations on a GPU take another way, for all who choose by them or count what was chosen.

The kernels in `mq_ao/ops/triton`, the lowering for GPUs and the cost model read them here, where no Triton is needed.
"""

from __future__ import annotations

FEW_ROWS = 16
"""Rows up to which linears have kernels of their own; the CUDA kernel behind `aten._int_mm` asks for more."""

FEW_OUTPUTS = 256
"""Outputs up to which a linear waits for its input: its pieces come from one kernel, which reads that once."""

LANES = 4
"""Lanes of a warp over which the selective scan can spread the states of a channel."""

SHORTEST_CHUNK = 32
"""Steps of a chunk of the selective scan, at least."""

BUSY_THREADS = 2**17
"""Threads that keep a GPU busy: about a thousand for each of its multiprocessors."""

ENOUGH_THREADS = 256
"""Threads of a multiprocessor with which once over all of time is not slower than twice over chunks."""

SSD_CHUNK = 64
"""Steps of a chunk of the SSD scan: what is quadratic in them then costs no more than what is in headdim or d_state."""


def scan_chunk(batch: int, length: int, channels: int, multiprocessors: int) -> int:
    """Steps of a chunk of the selective scan, or `length` where one walk over time is not slower than two of chunks."""
    chunk = max(SHORTEST_CHUNK, length * batch * channels // BUSY_THREADS)
    # Two chunks scanned twice take as long as all of it once.
    if 2 * chunk >= length or batch * channels * LANES >= ENOUGH_THREADS * multiprocessors:
        return length
    return chunk
