"""A Mamba-1 language model that exports to one graph for prefill and decode.

Parameter names are those of mamba_ssm's `MambaLMHeadModel`, so its checkpoints load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mq_ao.ops  # noqa: F401  (registers torch.ops.mq_ao)
from mq_ao.compat.operators import is_fake
from mq_ao.models import pretrained
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.models.generate import Sampling, generate
from mq_ao.models.mamba_nd_config import MambaNDConfig
from mq_ao.models.saving import save_pretrained
from mq_ao.models.states import State, States
from mq_ao.models.token_inputs import refuse_mask, token_ids


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with SiLU; weight (channels, 1, d_conv) as in `nn.Conv1d`."""

    def __init__(self, channels: int, d_conv: int, *, bias: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_conv)
        self.weight = nn.Parameter(torch.empty(channels, 1, d_conv).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (batch, length, channels), state (batch, d_conv - 1, channels), zeros if None -> the same shapes."""
        return torch.ops.mq_ao.causal_conv1d(x, self.weight.squeeze(1), self.bias, state, "silu")


def scan(
    u: Tensor,
    conv1d: CausalConv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of a Mamba-1 block, from in_proj to the gate.

    Args:
        u: (batch, length, d_inner).
        conv1d: the convolution, with SiLU.
        x_proj: to dt_rank + 2 * d_state channels.
        dt_proj: from dt_rank to d_inner channels, with bias.
        A_log: (d_inner, d_state).
        D: (d_inner,).
        conv_state: (batch, d_conv - 1, d_inner), zeros if None.
        ssm_state: (batch, d_inner, d_state), zeros if None.

    Returns:
        y (batch, length, d_inner) before the gate, and both new states.
    """
    u, conv_state = conv1d(u, conv_state)
    d_state = A_log.shape[1]
    dt, B, C = x_proj(u).split([dt_proj.in_features, d_state, d_state], dim=-1)
    # The bias goes into the scan, where it is added next to the softplus.
    delta = nn.functional.linear(dt, dt_proj.weight)
    # A in float32 whatever autocast does.
    A = -torch.exp(A_log.to(torch.float64 if u.dtype == torch.float64 else torch.float32))
    y, ssm_state = torch.ops.mq_ao.selective_scan(u, delta, A, B, C, D, dt_proj.bias, True, ssm_state)
    return y, conv_state, ssm_state


class MambaMixer(nn.Module):
    """The Mamba-1 block of the paper's Figure 3, gate included (equations in docs/method.md)."""

    def __init__(self, config: MambaConfig | MambaNDConfig) -> None:
        super().__init__()
        d_inner, d_state, rank = config.d_inner, config.d_state, config.rank
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, bias=config.conv_bias)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)

    def reset_parameters(self, n_layer: int) -> None:
        """Initialises as mamba_ssm does, in a model of `n_layer` blocks."""
        init_dt(self.dt_proj)
        init_projections(self.in_proj, self.out_proj, n_layer)

    def forward(
        self, x: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, length, d_model), states as in `scan`; returns the block's output and both new states."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y, conv_state, ssm_state = scan(
            u, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, conv_state, ssm_state
        )
        return self.out_proj(y * nn.functional.silu(z)), conv_state, ssm_state


class MambaBlock(nn.Module):
    """Pre-norm residual block: `hidden + mixer(norm(hidden))`."""

    def __init__(self, d_model: int, norm_epsilon: float, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=norm_epsilon)
        self.mixer = mixer

    def forward(self, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (batch, length, d_model); returns it updated, and both new states."""
        out, conv_state, ssm_state = self.mixer(self.norm(hidden), conv_state, ssm_state)
        return hidden + out, conv_state, ssm_state


class MambaBackbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MambaConfig | Mamba2Config, mixer: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        blocks = (MambaBlock(config.d_model, config.norm_epsilon, mixer(config)) for _ in range(config.n_layer))
        self.layers = nn.ModuleList(blocks)
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)

    def forward(self, input_ids: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids (batch, length) int64; states stacked over layers."""
        hidden = self.embedding(input_ids)
        conv_states, ssm_states = [], []
        for index, layer in enumerate(self.layers):
            hidden, conv, ssm = layer(hidden, conv_state[index], ssm_state[index])
            conv_states.append(conv)
            ssm_states.append(ssm)
        return self.norm_f(hidden), torch.stack(conv_states), torch.stack(ssm_states)


class MambaLM(nn.Module):
    """Mamba-1 language model (Gu and Dao, 2023) with explicit states.

    Args:
        config: the model's shape.
    """

    model_type: ClassVar[str] = "mq_ao.mamba"
    """`model_type` in the config.json of our own layout."""
    mixer_type: ClassVar[Callable[[Any], nn.Module]] = MambaMixer
    """What mixes tokens in a block."""

    def __init__(self, config: MambaConfig | Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config, type(self).mixer_type)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as mamba_ssm does: dt in [1e-3, 1e-1], residual writers scaled by 1/sqrt(n_layer)."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=0.02)
        mixers: list[Any] = [block.mixer for block in self.backbone.layers]
        for mixer in mixers:
            mixer.reset_parameters(self.config.n_layer)

    def initial_states(self, batch: int) -> tuple[Tensor, Tensor]:
        """Zero states: conv (n_layer, batch, d_conv - 1, conv_channels), ssm (n_layer, batch, *ssm_shape).

        They are float32, and float64 for a float64 model.
        """
        conv, ssm = self.carried.zeros(batch, self.backbone.embedding.weight.device)
        assert isinstance(conv, Tensor) and isinstance(ssm, Tensor)
        return conv, ssm

    @property
    def carried(self) -> States:
        """The states that a call takes and gives."""
        c = self.config
        dtype = torch.float64 if self.backbone.embedding.weight.dtype == torch.float64 else torch.float32
        return States(
            (
                State("conv_state", (c.n_layer, c.d_conv - 1, c.conv_channels), 1, dtype),
                State("ssm_state", (c.n_layer, *c.ssm_shape), 1, dtype),
            )
        )

    def forward(
        self,
        input_ids: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        *,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs `length` tokens from the given states (zeros where there is neither).

        Args:
            input_ids: (batch, length) in [0, vocab_size): integers of any width, a numpy array, or lists.
            conv_state: (n_layer, batch, d_conv - 1, conv_channels) float32.
            ssm_state: (n_layer, batch, *ssm_shape) float32.
            attention_mask: none is taken. Sequences of a batch have one length: padding would change the states.

        Returns:
            logits (batch, length, vocab_size) and both states after the last token.

        Raises:
            MqAoError: ids or states are not that, or there is a mask. Not while the model is traced.
        """
        refuse_mask(attention_mask)
        weight = self.backbone.embedding.weight
        # Shapes alone have no values to be checked.
        if not (torch.compiler.is_compiling() or weight.is_meta or is_fake(input_ids)):
            input_ids = token_ids(input_ids, self.config.vocab_size).to(weight.device)
            if conv_state is not None or ssm_state is not None:
                self.carried.check(len(input_ids), (conv_state, ssm_state))
        zero_conv, zero_ssm = self.initial_states(input_ids.shape[0])
        conv_state = zero_conv if conv_state is None else conv_state
        ssm_state = zero_ssm if ssm_state is None else ssm_state
        hidden, conv_state, ssm_state = self.backbone(input_ids, conv_state, ssm_state)
        return self.lm_head(hidden), conv_state, ssm_state

    @classmethod
    def from_pretrained(cls, source: str | Path) -> MambaLM:
        """Loads `"demo"`, a folder (transformers or mamba_ssm layout) or a hub id; see `loading.load`.

        Whatever class this is called on, a Mamba-2 checkpoint gives a `Mamba2LM`.
        """
        return pretrained.read(MambaLM, source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json into `folder`; see `models.saving.save_pretrained`."""
        save_pretrained(self, folder)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        *,
        attention_mask: Any = None,
    ) -> Tensor:
        """Continues `input_ids` (batch, length); see `models.generate.generate`.

        Raises:
            MqAoError: the prompt is empty, not (batch, length) integers, or outside the vocabulary; or the mask does
                not say what is padding on the left.
        """
        chosen = (sampling or Sampling()).within(self.known_tokens)
        return generate(self, input_ids, max_new_tokens, chosen, attention_mask=attention_mask, states=self.carried)

    @property
    def known_tokens(self) -> int | None:
        """Tokens that the vocabulary had before it was padded, where the configuration tells."""
        return getattr(self.config, "known_tokens", None)


def init_projections(in_proj: nn.Linear, out_proj: nn.Linear, n_layer: int) -> None:
    """Scales what writes into the residual stream by 1/sqrt(n_layer); biases are zero."""
    nn.init.kaiming_uniform_(out_proj.weight, a=math.sqrt(5))
    with torch.no_grad():
        out_proj.weight /= math.sqrt(n_layer)
    for linear in (in_proj, out_proj):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def init_dt(dt_proj: nn.Linear) -> None:
    """Initialises so that softplus(bias) is log-uniform in [1e-3, 0.1] (Mamba paper, section 3.6)."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    with torch.no_grad():
        dt_proj.bias.copy_(dt_bias(dt_proj.out_features))


def dt_bias(count: int, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> Tensor:
    """Biases (count,) whose softplus is log-uniform in [dt_min, dt_max]."""
    dt = torch.exp(torch.rand(count) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))
