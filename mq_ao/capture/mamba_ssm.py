"""mamba_ssm's functions, for its own models and for any code that calls them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mq_ao.capture import carrying, norm_functions, scans
from mq_ao.capture.replacing import Replacement, imported
from mq_ao.errors import MqAoError


def import_mamba_ssm() -> ModuleType:
    """Imports mamba_ssm, also where its CUDA extension is missing: its models can then be built, loaded and captured.

    Without the extension they cannot run by themselves, and neither can transformers' Mamba models that are imported
    afterwards, since those call mamba_ssm where they find it.

    Raises:
        MqAoError: mamba_ssm, or something that it needs, is not installed.
    """
    missing = _EXTENSION not in sys.modules and importlib.util.find_spec(_EXTENSION) is None
    if missing:
        sys.modules[_EXTENSION] = _stand_in()
    try:
        return importlib.import_module("mamba_ssm")
    except ImportError as error:
        if missing:
            del sys.modules[_EXTENSION]
        raise MqAoError(
            f"mamba_ssm cannot be imported ({error}): install it with `MAMBA_FORCE_BUILD=TRUE "
            "MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops triton`."
        ) from error


_EXTENSION = "selective_scan_cuda"


def _stand_in() -> ModuleType:
    module = ModuleType(_EXTENSION, "Stands in for mamba_ssm's CUDA extension, which is not installed.")

    def missing(name: str) -> Any:
        raise AttributeError(
            f"mamba_ssm's CUDA extension is not installed, and its {name} is called: capture the model with "
            "mq_ao.export and run the program."
        )

    # A module's own, which Python looks for (PEP 562); mypy knows that of the class alone.
    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


def replacements(module: nn.Module) -> Iterator[Replacement]:
    """What stands in for mamba_ssm's and causal_conv1d's functions during a capture, as far as they are imported."""
    # Through its autograd function each of them is reached, whoever holds a reference to it.
    for place, functions in _FUNCTIONS.items():
        for name, ours in functions.items():
            function = getattr(sys.modules.get(place), name, None)
            if function is not None:
                yield Replacement(function, "apply", ours)
    if "mamba_ssm" in sys.modules:
        # Where causal_conv1d is not installed, its name is None, and the fast path that needs it is left out.
        for source in imported():
            if vars(source).get("causal_conv1d_fn", ...) is None:
                yield Replacement(source, "causal_conv1d_fn", scans.causal_conv1d_fn)
    if isinstance(module, carrying.Stateful):
        for part in module.modules():
            if type(part).__module__.startswith("mamba_ssm.modules.") and hasattr(part, "in_proj"):
                yield Replacement(part, "forward", functools.partial(_in_layer, part))


def _in_layer(mixer: nn.Module, x: Tensor, inference_params: None = None, **kwargs: Any) -> Tensor:
    """A mixer's forward while states are carried: as of a whole sequence, which the functions below go on with."""
    carried: Any = carrying.current()
    carried.enter(mixer.layer_idx)
    forward = multi_head_attention if type(mixer).__name__ == "MHA" else type(mixer).forward
    return forward(mixer, x, **kwargs)


def multi_head_attention(mixer: Any, x: Tensor) -> Tensor:
    """`mamba_ssm.modules.mha.MHA`, causal, on keys and values of its own heads, which it does not repeat.

    Args:
        mixer: the module.
        x: (batch, length, embed_dim).

    Raises:
        MqAoError: its attention is not causal, or it rotates positions, for which it needs flash_attn.
    """
    if not mixer.causal or mixer.rotary_emb_dim:
        what = "with rotary positions" if mixer.causal else "that is not causal"
        raise MqAoError(f"attention of mamba_ssm {what} is not supported in a model with states.")
    qkv = mixer.in_proj(x)
    own = qkv.shape[-1] - mixer.mlp_dim
    qkv, mlp = qkv.split([own, mixer.mlp_dim], dim=-1) if mixer.mlp_dim else (qkv, None)
    if mixer.d_conv:
        qkv, _ = scans.causal_conv1d(qkv, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, None)
    sizes = [heads * mixer.head_dim for heads in (mixer.num_heads, mixer.num_heads_kv, mixer.num_heads_kv)]
    query, key, value = (part.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for part in qkv.split(sizes, dim=-1))
    carried: Any = carrying.current()
    carried.update(key, value, mixer.layer_idx)
    y = carrying.attend(query, mixer.softmax_scale).flatten(-2)
    if mlp is not None:
        up, gate = mlp.chunk(2, dim=-1)
        y = torch.cat([y, up * silu(gate)], dim=-1)
    return mixer.out_proj(y)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The whole mixer but in_proj.

    Args:
        xz: (batch, 2 d_inner, length), output of in_proj.
        B, C: (batch, [groups,] d_state, length); None to take them from x_proj's output.
        Others as in mamba_ssm.
    """
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x, _ = scans.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, d_state = delta_proj_weight.shape[1], A.shape[-1]
    projected = linear(x, x_proj_weight)
    dt, *matrices = projected.split([rank, *[d_state] * ((B is None) + (C is None))], dim=-1)
    delta = linear(dt, delta_proj_weight)
    if dt_rms_weight is not None:
        delta = norm_functions.rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    B = scans.channel_last(B) if B is not None else _matrix(matrices[0], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    C = scans.channel_last(C) if C is not None else _matrix(matrices[-1], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y, _ = scans.selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y, out_proj_weight, out_proj_bias)


def _matrix(x: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float) -> Tensor:
    """B or C from its part of x_proj's output."""
    x = x if bias is None else x + bias.to(x.dtype)
    return x if rms_weight is None else norm_functions.rms_norm(x, rms_weight, eps)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the residual and normalises the sum: one addition and one norm.

    Raises:
        MqAoError: a second input or norm, dropout, or scales of rows.
    """
    if any(value is not None for value in (x1, weight1, bias1, rowscale)) or dropout_p or return_dropout_mask:
        raise MqAoError("a fused norm with a second input, dropout or row scales cannot be captured.")
    total = x if residual is None else x + residual
    if is_rms_norm:
        y = norm_functions.rms_norm(total, weight, eps)
        y = y if bias is None else y + bias.to(y.dtype)
    else:
        y = norm_functions.layer_norm(total, weight, bias, eps)
    y = y.to(x.dtype)
    if not prenorm:
        return y
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return y, total.to(kept)


def gated_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """`mamba_ssm.ops.triton.layernorm_gated.layernorm_fn`: x, z (..., channels)."""

    def norm(x: Tensor) -> Tensor:
        if not is_rms_norm:
            return norm_functions.layer_norm(x, weight, bias, eps, group_size)
        y = norm_functions.rms_norm(x, weight, eps, group_size)
        return y if bias is None else y + bias.to(y.dtype)

    return norm_functions.gated(norm, x, z, norm_before_gate=norm_before_gate)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The whole Mamba-2 mixer but in_proj: zxbcdt (batch, length, channels of in_proj)."""
    nheads = dt_bias.shape[0]
    headdim = D.shape[1] if D.dim() == 2 else headdim
    if headdim is None:
        raise MqAoError("mamba_split_conv1d_scan_combined needs headdim where D is one number a head.")
    d_ssm = nheads * headdim
    d_state = (conv1d_weight.shape[0] - d_ssm) // (2 * ngroups)
    d_mlp = (zxbcdt.shape[-1] - d_ssm - conv1d_weight.shape[0] - nheads) // 2
    sizes = [d_ssm, conv1d_weight.shape[0], nheads]
    mlp = ()
    if d_mlp:
        *mlp, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, *sizes], dim=-1)
    else:
        z, xBC, dt = zxbcdt.split(sizes, dim=-1)
    xBC, _ = scans.causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation, seq_idx)
    x, B, C = xBC.split([d_ssm, ngroups * d_state, ngroups * d_state], dim=-1)
    y, last = scans.ssd_scan(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, d_state)),
        C.unflatten(-1, (ngroups, d_state)),
        D,
        None,
        dt_bias,
        True,
        dt_limit,
        initial_states,
        seq_idx,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = y * silu(z)
    else:
        y = gated_norm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, d_ssm // ngroups, norm_before_gate, True)
    if mlp:
        y = torch.cat((silu(mlp[0]) * mlp[1], y), dim=-1)
    if outproj_weight is not None:
        y = linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y


_FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "causal_conv1d.causal_conv1d_interface": {"CausalConv1dFn": scans.causal_conv1d_fn},
    "mamba_ssm.ops.selective_scan_interface": {
        "SelectiveScanFn": scans.selective_scan_fn,
        "MambaInnerFn": mamba_inner_fn,
    },
    "mamba_ssm.ops.triton.layer_norm": {"LayerNormFn": layer_norm_fn},
    "mamba_ssm.ops.triton.layernorm_gated": {"LayerNormFn": gated_norm_fn},
    "mamba_ssm.ops.triton.ssd_combined": {
        "MambaChunkScanCombinedFn": scans.mamba_chunk_scan_combined,
        "MambaSplitConv1dScanCombinedFn": mamba_split_conv1d_scan_combined,
    },
}
"""Autograd functions by module: the one who calls `apply` gives all arguments by position, in the order of ours."""
