"""The public signatures of Mamba's kernels, computed by our channel-last operators.

Under `layout.ChannelLast` the transposes here meet those of the caller, and neither is in the graph.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import silu

from mq_ao.errors import MqAoError


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
        MqAoError: packed sequences, states written in place, or an activation other than SiLU.
    """
    if seq_idx is not None:
        raise MqAoError("a convolution over packed sequences (seq_idx) cannot be captured: give one sequence a row.")
    if final_states_out is not None:
        raise MqAoError("a convolution that writes its last state in place (final_states_out) cannot be captured.")
    if activation not in (None, "silu", "swish"):
        raise MqAoError(f"a convolution with activation {activation!r} cannot be captured: only None and 'silu' can.")
    y, last = torch.ops.mq_ao.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        None if initial_states is None else initial_states.transpose(1, 2),
        None if activation is None else "silu",
    )
    y = y.transpose(1, 2)
    return (y, last.transpose(1, 2)) if return_final_states else y


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.selective_scan_fn`: u, delta, z (batch, channels, length), B, C (batch, [groups,] d_state, length).

    Raises:
        MqAoError: A is complex, or B or C does not depend on the input.
    """
    if A.is_complex():
        raise MqAoError("the scan's A is complex, as in S4; only a real A, as in Mamba, can be captured.")
    for name, value in (("B", B), ("C", C)):
        if value.dim() not in (3, 4):
            raise MqAoError(
                f"the scan's {name} has shape {tuple(value.shape)}: only one that depends on the input, "
                "(batch, [groups,] d_state, length), can be captured."
            )
    dtype = _common_dtype(u, delta, B, C)
    y, last = torch.ops.mq_ao.selective_scan(
        u.transpose(1, 2).to(dtype),
        delta.transpose(1, 2).to(dtype),
        A,
        *(v.movedim(-1, 1).to(dtype) if v.dim() == 4 else v.transpose(1, 2).to(dtype) for v in (B, C)),
        D,
        delta_bias,
        delta_softplus,
    )
    y = y.to(u.dtype)
    if z is not None:
        y = y * silu(z.transpose(1, 2))
    y = y.transpose(1, 2)
    return (y, last) if return_last_state else y


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
    """`mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined`: x, z (batch, length, heads, headdim).

    `chunk_size` chooses how the kernel works and not what it computes.

    Raises:
        MqAoError: packed sequences given by cumulative lengths.
    """
    if cu_seqlens is not None or return_varlen_states:
        raise MqAoError("a scan over packed sequences (cu_seqlens) cannot be captured: give one sequence a row.")
    dtype = _common_dtype(x, dt, B, C)
    low, high = dt_limit
    y, last = torch.ops.mq_ao.ssd_scan(
        x.to(dtype),
        dt.to(dtype),
        A,
        B.to(dtype),
        C.to(dtype),
        D,
        dt_bias,
        dt_softplus,
        low,
        None if high == float("inf") else high,
        initial_states,
        seq_idx,
    )
    y = y.to(x.dtype)
    if z is not None:
        y = y * silu(z)
    return (y, last) if return_final_states else y


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds all of them: our scans want one, the public kernels take a mixture."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)
