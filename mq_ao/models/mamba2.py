"""A Mamba-2 language model (Dao and Gu, ICML 2024) that exports to one graph for prefill and decode.

Parameter names are those of mamba_ssm's `MambaLMHeadModel` with `Mamba2` layers, so its checkpoints load unchanged.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import mq_ao.ops  # noqa: F401  (registers torch.ops.mq_ao)
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.models.mamba import CausalConv1d, MambaLM, dt_bias, init_projections


class GatedRMSNorm(nn.Module):
    """RMSNorm of y * SiLU(z), or of y before it is gated, in groups of channels.

    Args:
        channels: size of the last axis.
        groups: how many parts of it are normalised each on its own.
        eps: added to the mean square.
        before_gate: whether the gate comes after the norm.
    """

    def __init__(self, channels: int, groups: int, eps: float, *, before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps, self.before_gate = groups, eps, before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., channels) -> the same shape."""
        if self.before_gate:
            return self._normalised(y) * functional.silu(z)
        return self._normalised(y * functional.silu(z))

    def _normalised(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        size = len(self.weight) // self.groups
        parts = functional.rms_norm(x.unflatten(-1, (self.groups, size)), (size,), None, self.eps)
        return parts.flatten(-2) * self.weight


class Mamba2Mixer(nn.Module):
    """The Mamba-2 block of the paper's Figure 6, gated norm included; in_proj = [z, x, B, C, dt]."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        states = config.ngroups * config.d_state
        self.in_split = [config.d_inner, config.conv_channels, config.heads]
        self.conv_split = [config.d_inner, states, states]
        self.in_proj = nn.Linear(config.d_model, sum(self.in_split), bias=config.bias)
        self.conv1d = CausalConv1d(config.conv_channels, config.d_conv, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(config.heads))
        self.A_log = nn.Parameter(torch.zeros(config.heads))
        self.D = nn.Parameter(torch.ones(config.d_inner if config.D_has_hdim else config.heads))
        self.norm = GatedRMSNorm(
            config.d_inner, config.norm_groups, config.norm_epsilon, before_gate=config.norm_before_gate
        )
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=config.bias)

    def reset_parameters(self, n_layer: int) -> None:
        """Initialises as mamba_ssm does, in a model of `n_layer` blocks: A uniform in [1, 16]."""
        with torch.no_grad():
            self.dt_bias.copy_(dt_bias(self.config.heads))
            self.A_log.uniform_(1, 16).log_()
        init_projections(self.in_proj, self.out_proj, n_layer)

    def forward(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, length, d_model); returns the block's output and both new states."""
        c = self.config
        z, xbc, dt = self.in_proj(x).split(self.in_split, dim=-1)
        xbc, conv_state = self.conv1d(xbc, conv_state)
        u, B, C = xbc.split(self.conv_split, dim=-1)
        y, ssm_state = torch.ops.mq_ao.ssd_scan(
            u.unflatten(-1, (c.heads, c.headdim)),
            dt,
            -torch.exp(self.A_log.to(ssm_state.dtype)),
            B.unflatten(-1, (c.ngroups, c.d_state)),
            C.unflatten(-1, (c.ngroups, c.d_state)),
            self.D.view(c.heads, c.headdim) if c.D_has_hdim else self.D,
            self.dt_bias,
            True,
            c.dt_min,
            c.dt_max,
            ssm_state,
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), conv_state, ssm_state


def language_model(config: MambaConfig | Mamba2Config) -> MambaLM:
    """A model of that shape, with random weights."""
    return Mamba2LM(config) if isinstance(config, Mamba2Config) else MambaLM(config)


class Mamba2LM(MambaLM):
    """Mamba-2 language model with explicit states, of which ssm is (n_layer, batch, heads, headdim, d_state).

    Args:
        config: the model's shape.
    """

    model_type: ClassVar[str] = "mq_ao.mamba2"
    mixer_type: ClassVar[Any] = Mamba2Mixer
    config: Mamba2Config
