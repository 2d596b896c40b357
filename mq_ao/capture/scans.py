"""The public signatures of Mamba's kernels, computed by our channel-last operators.

First our operators with the checks and the gate that every public signature needs, channel-last; then the signatures.
Under `layout.ChannelLast` their transposes meet those of the caller, and neither is in the graph.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import silu

from mq_ao.capture import carrying
from mq_ao.errors import MqAoError


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution of x (batch, length, channels) by weight (channels, d_conv); returns y and the last state.

    While states are carried, it goes on from its own.

    Raises:
        MqAoError: packed sequences, or an activation other than SiLU.
    """
    if seq_idx is not None:
        raise MqAoError("a convolution over packed sequences (seq_idx) is not supported: give one sequence a row.")
    if activation not in (None, "silu", "swish"):
        raise MqAoError(f"a convolution with activation {activation!r} is not supported, only None and 'silu' are.")
    activation = None if activation is None else "silu"
    first = _first("conv", initial_state)
    return _kept("conv", torch.ops.mq_ao.causal_conv1d(x, weight, bias, first, activation))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-1, times SiLU(z): u, delta, z (batch, length, channels), B, C (batch, length, [groups,] d_state).

    While states are carried, it goes on from its own, and so does `ssd_scan`.

    Raises:
        MqAoError: A is complex, or B or C does not depend on the input.
    """
    if A.is_complex():
        raise MqAoError("the scan's A is complex, as in S4: only a real A, as in Mamba, is supported.")
    for name, value in (("B", B), ("C", C)):
        if value.dim() not in (3, 4):
            raise MqAoError(
                f"the scan's {name} has shape {tuple(value.shape)}: only one that depends on the input, with axes for "
                "batch and length, is supported."
            )
    dtype = _common_dtype(u, delta, B, C)
    first = _first("ssm", initial_state)
    results = torch.ops.mq_ao.selective_scan(
        u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), D, delta_bias, delta_softplus, first
    )
    y, last = _kept("ssm", results)
    y = y.to(u.dtype)
    return (y if z is None else y * silu(z)), last


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2, times SiLU(z): x, z (batch, length, heads, headdim), B, C (batch, length, groups, d_state)."""
    dtype = _common_dtype(x, dt, B, C)
    low, high = dt_limit
    high_or_none = None if high == float("inf") else high
    first = _first("ssm", initial_state)
    results = torch.ops.mq_ao.ssd_scan(
        *(x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), D, dt_bias, dt_softplus),
        *(low, high_or_none, first, seq_idx),
    )
    y, last = _kept("ssm", results)
    y = y.to(x.dtype)
    return (y if z is None else y * silu(z)), last


def _first(kind: str, given: Tensor | None) -> Tensor | None:
    """The state to go on from."""
    carried = carrying.current()
    return given if carried is None else carried.given(kind)


def _kept(kind: str, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and last state, which is kept where states are carried."""
    if (carried := carrying.current()) is not None:
        carried.keep(kind, results[1])
    return results


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d.causal_conv1d_fn`: x (batch, channels, length), weight (channels, d_conv).

    Raises:
        MqAoError: as `causal_conv1d`, or the last state is to be written in place.
    """
    if final_states_out is not None:
        raise MqAoError("a convolution that writes its last state in place (final_states_out) is not supported.")
    initial_state = None if initial_states is None else initial_states.transpose(1, 2)
    y, last = causal_conv1d(x.transpose(1, 2), weight, bias, activation, seq_idx, initial_state)
    return (y.transpose(1, 2), last.transpose(1, 2)) if return_final_states else y.transpose(1, 2)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.selective_scan_fn`: u, delta, z (batch, channels, length), B, C (batch, [groups,] d_state, length).

    That has no initial state; ours is (batch, channels, d_state).

    Raises:
        MqAoError: as `selective_scan`.
    """
    B, C = channel_last(B), channel_last(C)
    z = None if z is None else z.transpose(1, 2)
    u, delta = u.transpose(1, 2), delta.transpose(1, 2)
    y, last = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    return (y.transpose(1, 2), last) if return_last_state else y.transpose(1, 2)


def channel_last(matrix: Tensor) -> Tensor:
    """B or C of mamba_ssm, (batch, [groups,] d_state, length), as (batch, length, [groups,] d_state)."""
    if matrix.dim() == 4:
        return matrix.permute(0, 3, 1, 2)
    return matrix.transpose(1, 2) if matrix.dim() == 3 else matrix


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`, of axes as in `ssd_scan`.

    `chunk_size` chooses how the kernel works and not what it computes.

    Raises:
        MqAoError: packed sequences given by cumulative lengths.
    """
    if cu_seqlens is not None or return_varlen_states:
        raise MqAoError("a scan over packed sequences (cu_seqlens) is not supported: give one sequence a row.")
    y, last = ssd_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states, seq_idx)
    return (y, last) if return_final_states else y


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds all of them: our scans want one, the public kernels take a mixture."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)
