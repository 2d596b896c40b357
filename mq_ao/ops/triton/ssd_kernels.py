"""Kernels of `mq_ao::ssd_scan` and `mq_ao::qssd_scan`: the block decomposition of Dao and Gu 2024, section 6.

Time is cut into chunks: `_add_up` makes the state that each chunk adds, `carry` turns those into the states that chunks
start from, and `_outputs` computes

    y = (C B^T * decays) (step x) + exp(decays so far) C start^T + D x

for each chunk. `_step` is for one step. All products run on tensor cores and add up in float32. 8-bit numbers less
their zero points, and bfloat16, are bfloat16 exactly: C B^T of integers is exact, and where a float32 matrix meets such
numbers it goes as the sum of two bfloat16 ones, which leaves 2^-18 of each product. Two float32 matrices take three
TF32 products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mq_ao.ops.triton.launch import Config, Kernel
from mq_ao.ops.triton.operands import centred, parameter, read, step_size
from mq_ao.ops.triton.rounding import write


@triton.jit
def _exact(at, mask, zero_point):
    """Value over scale without any rounding: bfloat16 where that holds it, and else float32."""
    x = centred(at, mask, zero_point)
    if at.dtype.scalar.element_ty.is_int() or at.dtype.scalar.element_ty == tl.bfloat16:
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _halves(x):
    """float32 as the sum of two bfloat16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b, total):
    """total + a b for any mixture of float32 and bfloat16."""
    if a.dtype == b.dtype:
        total = tl.dot(a, b, total, input_precision="tf32x3")
    elif a.dtype == tl.float32:
        high, low = _halves(a)
        total = tl.dot(low, b, total)
        total = tl.dot(high, b, total)
    else:
        high, low = _halves(b)
        total = tl.dot(a, low, total)
        total = tl.dot(a, high, total)
    return total


@triton.jit
def _steps(dt, A, dt_bias, rows, inside, head, dt_row, dt_scale, dt_zero_point, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """Step sizes of one head, 0 outside, and the sums of their exponents up to each of them."""
    bias = parameter(dt_bias, head, True)
    step = step_size(dt + rows * dt_row + head, inside, dt_scale, dt_zero_point, bias, SOFTPLUS)
    step = tl.clamp(step, dt_min, dt_max, propagate_nan=tl.PropagateNan.ALL)
    step = tl.where(inside, step, 0.0)
    return step, tl.cumsum(step * tl.load(A + head), axis=0)


@triton.jit(do_not_specialize=["length"])
def _add_up(
    x,
    dt,
    B,
    A,
    dt_bias,
    ids,
    states,
    totals,
    heads,
    length,
    group_heads,
    x_row,
    dt_row,
    B_row,
    dt_scale,
    dt_zero_point,
    dt_min,
    dt_max,
    x_scale,
    x_zero_point,
    B_scale,
    B_zero_point,
    HEADDIM: tl.constexpr,
    D_STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of the state that one chunk adds for one head, and by which exponent it multiplies the state before."""
    blocks: tl.constexpr = triton.cdiv(HEADDIM, BLOCK_P) * triton.cdiv(D_STATE, BLOCK_N)
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    p = (block // triton.cdiv(D_STATE, BLOCK_N)) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (block % triton.cdiv(D_STATE, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = chunk * CHUNK
    t = first + tl.arange(0, CHUNK)
    inside = t < length
    row = batch * length + t
    step, sums = _steps(dt, A, dt_bias, row, inside, head, dt_row, dt_scale, dt_zero_point, dt_min, dt_max, SOFTPLUS)
    total = tl.sum(tl.where(t == first + CHUNK - 1, sums, 0.0), axis=0)
    weight = tl.exp(total - sums) * step * (x_scale * B_scale)
    if ids is not None:
        last = tl.load(ids + batch * length + tl.minimum(first + CHUNK, length) - 1)
        before = tl.load(ids + batch * length + tl.maximum(first - 1, 0))
        weight = tl.where(tl.load(ids + row, mask=inside, other=-1) == last, weight, 0.0)
        total = tl.where(before == last, total, -float("inf"))
    of_chunk = (batch * (tl.num_programs(0) // blocks) + chunk) * heads + head
    if block == 0:
        tl.store(totals + of_chunk, total)
    values = _exact(
        x + (row * x_row)[:, None] + head * HEADDIM + p[None, :], inside[:, None] & (p < HEADDIM)[None, :], x_zero_point
    )
    mask = inside[:, None] & (n < D_STATE)[None, :]
    b = centred(B + (row * B_row)[:, None] + (head // group_heads) * D_STATE + n[None, :], mask, B_zero_point)
    added = _product(tl.trans(values), b * weight[:, None], tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32))
    at = states + of_chunk * HEADDIM * D_STATE + p[:, None] * D_STATE + n[None, :]
    tl.store(at, added, mask=(p < HEADDIM)[:, None] & (n < D_STATE)[None, :])


@triton.jit(do_not_specialize=["length"])
def _outputs(
    x,
    dt,
    B,
    C,
    A,
    D,
    dt_bias,
    ids,
    states,
    y,
    heads,
    length,
    group_heads,
    x_row,
    dt_row,
    B_row,
    C_row,
    D_head,
    D_inner,
    dt_scale,
    dt_zero_point,
    dt_min,
    dt_max,
    x_scale,
    x_zero_point,
    B_scale,
    B_zero_point,
    C_scale,
    C_zero_point,
    out_inverse,
    out_zero_point,
    HEADDIM: tl.constexpr,
    D_STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Outputs of one head over one chunk, for a block of headdim."""
    blocks: tl.constexpr = triton.cdiv(HEADDIM, BLOCK_P)
    chunk = tl.program_id(0) // blocks
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    first = chunk * CHUNK
    t = first + tl.arange(0, CHUNK)
    inside = t < length
    row = batch * length + t
    step, sums = _steps(dt, A, dt_bias, row, inside, head, dt_row, dt_scale, dt_zero_point, dt_min, dt_max, SOFTPLUS)
    group = (head // group_heads) * D_STATE
    of_chunk = (batch * (tl.num_programs(0) // blocks) + chunk) * heads + head
    start_at = states + of_chunk * HEADDIM * D_STATE + p[:, None] * D_STATE + n[None, :]
    b_at = B + (row * B_row)[:, None] + group + n[None, :]
    c_at = C + (row * C_row)[:, None] + group + n[None, :]
    scores = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    out = tl.zeros((CHUNK, BLOCK_P), dtype=tl.float32)
    for block in range(0, D_STATE, BLOCK_N):
        more = (n < D_STATE - block)[None, :]
        c = _exact(c_at + block, inside[:, None] & more, C_zero_point)
        b = _exact(b_at + block, inside[:, None] & more, B_zero_point)
        start = tl.load(start_at + block, mask=(p < HEADDIM)[:, None] & more, other=0.0)
        scores = _product(c, tl.trans(b), scores)
        out = _product(c, tl.trans(start), out)
    since_start = tl.exp(sums)
    seen = t[:, None] >= t[None, :]
    if ids is not None:
        own = tl.load(ids + row, mask=inside, other=-1)
        before = tl.load(ids + batch * length + tl.maximum(first - 1, 0))
        since_start = tl.where(own == before, since_start, 0.0)
        seen = seen & (own[:, None] == own[None, :])
    out = out * (since_start * C_scale)[:, None]
    exponents = tl.where(seen, sums[:, None] - sums[None, :], 0.0)
    weight = (step * (B_scale * C_scale))[None, :] * tl.exp(exponents)
    scores = tl.where(seen, scores * weight, 0.0)
    mask = inside[:, None] & (p < HEADDIM)[None, :]
    values = _exact(x + (row * x_row)[:, None] + head * HEADDIM + p[None, :], mask, x_zero_point)
    out += x_scale * _product(scores, values, tl.zeros((CHUNK, BLOCK_P), dtype=tl.float32))
    skip = parameter(D, head * D_head + p * D_inner, p < HEADDIM)
    out += values.to(tl.float32) * (skip * x_scale)
    write(y + (row * heads + head)[:, None] * HEADDIM + p[None, :], out, mask, out_inverse, out_zero_point)


@triton.jit
def _step(
    x,
    dt,
    B,
    C,
    A,
    D,
    dt_bias,
    start,
    end,
    y,
    heads,
    group_heads,
    x_row,
    dt_row,
    B_row,
    C_row,
    D_head,
    D_inner,
    dt_scale,
    dt_zero_point,
    dt_min,
    dt_max,
    x_scale,
    x_zero_point,
    B_scale,
    B_zero_point,
    C_scale,
    C_zero_point,
    out_inverse,
    out_zero_point,
    HEADDIM: tl.constexpr,
    D_STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A block of headdim of one head of one sequence, one step."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inner = p < HEADDIM
    of_state = n < D_STATE
    step = step_size(
        dt + batch * dt_row + head, True, dt_scale, dt_zero_point, parameter(dt_bias, head, True), SOFTPLUS
    )
    step = tl.clamp(step, dt_min, dt_max, propagate_nan=tl.PropagateNan.ALL)
    group = (head // group_heads) * D_STATE
    values = read(x + batch * x_row + head * HEADDIM + p, inner, x_scale, x_zero_point)
    b = read(B + batch * B_row + group + n, of_state, B_scale, B_zero_point)
    h = (step * values)[:, None] * b[None, :]
    states = (batch * heads + head) * HEADDIM * D_STATE + p[:, None] * D_STATE + n[None, :]
    mask = inner[:, None] & of_state[None, :]
    if start is not None:
        h += tl.exp(step * tl.load(A + head)) * tl.load(start + states, mask=mask, other=0.0)
    c = read(C + batch * C_row + group + n, of_state, C_scale, C_zero_point)
    out = tl.sum(h * c[None, :], axis=1) + values * parameter(D, head * D_head + p * D_inner, inner)
    write(y + (batch * heads + head) * HEADDIM + p, out, inner, out_inverse, out_zero_point)
    tl.debug_barrier()  # the end may lie over the start
    tl.store(end + states, h, mask=mask)


_ADDING = (Config(4, 1, BLOCK_P=64, BLOCK_N=64), Config(4, 1, BLOCK_P=32, BLOCK_N=64))
_OUTPUTS = (Config(4, 2, BLOCK_P=64, BLOCK_N=32), Config(8, 2, BLOCK_P=64, BLOCK_N=32))
# Each warp holds the right matrix of a product, and float32 ones are held as three of TF32: smaller blocks.
_ADDING_FLOAT32 = (Config(4, 1, BLOCK_P=32, BLOCK_N=32), Config(4, 1, BLOCK_P=64, BLOCK_N=16))
_OUTPUTS_FLOAT32 = (Config(4, 2, BLOCK_P=32, BLOCK_N=16), Config(4, 2, BLOCK_P=16, BLOCK_N=16))
_STEPS = (Config(4, 1, BLOCK_P=8), Config(4, 1, BLOCK_P=16))
_KEY = ("heads", "HEADDIM", "D_STATE")
add_up = Kernel(_add_up, _ADDING, key=_KEY)
add_up_float32 = Kernel(_add_up, _ADDING_FLOAT32, key=_KEY)
outputs = Kernel(_outputs, _OUTPUTS, key=_KEY)
outputs_float32 = Kernel(_outputs, _OUTPUTS_FLOAT32, key=_KEY)
step = Kernel(_step, _STEPS, key=_KEY, changes=("end",))
