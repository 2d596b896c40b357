"""Carrying states over chunks: between the kernels that scan each chunk alone, and those that know where it starts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.operands import read_state, write_state


@triton.jit(do_not_specialize=["chunks"])
def _carry(states, exponents, A, start, end, state_scale, size, chunks, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """One program takes BLOCK states of a sequence through all its chunks; loads are kept in flight ahead of it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    mask = at < size
    scale_at = None if state_scale is None else state_scale + at
    h = tl.zeros((BLOCK,), dtype=tl.float32)
    if start is not None:
        h = read_state(start + batch * size + at, scale_at, mask)
    factor = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if A is not None:
        factor = tl.load(A + at, mask=mask, other=0.0)
    state = states + batch * chunks * size + at
    exponent = exponents + batch * chunks * (size // INNER) + at // INNER
    for _ in tl.range(0, chunks, num_stages=4):
        added = tl.load(state, mask=mask, other=0.0)
        decay = tl.exp(tl.load(exponent, mask=mask, other=0.0) * factor)
        tl.store(state, h, mask=mask)
        h = decay * h + added
        state += size
        exponent += size // INNER
    write_state(end + batch * size + at, scale_at, h, mask)


# One configuration alone: trying several would carry over what is carried already, as it is done in place.
kernel = Kernel(_carry, (Config(4, 2, BLOCK=256),))


def carry(
    states: Tensor,
    exponents: Tensor,
    A: Tensor | None,
    start: Tensor | None,
    end: Tensor,
    state_scale: Tensor | None = None,
) -> None:
    """Turns the states that chunks make from zero into those that they start from, in place.

    Args:
        states: (batch, chunks, ...) float32, dense; read, then overwritten.
        exponents: (batch, chunks, ...) float32, dense: one for each run of states; over the chunk they are multiplied
            by its exponential.
        A: float32 factors of exponents, one for each of a chunk's states; 1 if None.
        start: (batch, ...), the states before the first chunk, zeros if None; int8 with `state_scale`.
        end: like it, where states after the last chunk are written.
        state_scale: steps of int8 states, for each state of a sequence.
    """
    batch, chunks = states.shape[:2]
    size = states[0, 0].numel()
    kernel.launch(
        lambda meta: (triton.cdiv(size, meta["BLOCK"]), batch),
        states,
        exponents,
        A,
        start,
        end,
        state_scale,
        size,
        chunks,
        INNER=size // exponents[0, 0].numel(),
    )
