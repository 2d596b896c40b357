"""Vision Mamba (Zhu et al., ICML 2024), version 2 of its bidirectional block: an image classifier that exports.

Parameter names are those of the public Vim-T, Vim-S and Vim-B checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mq_ao.errors import MqAoError
from mq_ao.models import pretrained
from mq_ao.models.mamba import CausalConv1d, init_dt, init_projections, scan
from mq_ao.models.patches import embed_patches
from mq_ao.models.saving import save_pretrained
from mq_ao.models.vision_config import VimConfig


class VimMixer(nn.Module):
    """A Mamba-1 block that reads the sequence in both directions.

    in_proj, gate and out_proj are shared; each direction has its own convolution, x_proj, dt_proj, A and D. The gate
    is applied once, to the sum of both directions, which is the same as to each.
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        d_inner, d_state, rank = config.d_inner, config.d_state, config.rank
        self.factor = 0.5 if config.mean_of_directions else 1.0
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, bias=config.conv_bias)
        self.conv1d_b = CausalConv1d(d_inner, config.d_conv, bias=config.conv_bias)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.x_proj_b = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner, bias=True)
        self.dt_proj_b = nn.Linear(rank, d_inner, bias=True)
        a_log = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1)
        self.A_log = nn.Parameter(a_log)
        self.A_b_log = nn.Parameter(a_log.clone())
        self.D = nn.Parameter(torch.ones(d_inner))
        self.D_b = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)

    def reset_parameters(self, n_layer: int) -> None:
        """Initialises as mamba_ssm does, in a model of `n_layer` blocks."""
        init_dt(self.dt_proj)
        init_dt(self.dt_proj_b)
        init_projections(self.in_proj, self.out_proj, n_layer)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, d_model) -> the same shape."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        forth, _, _ = scan(u, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back, _, _ = scan(u.flip(1), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        y = forth + back.flip(1)
        if self.factor != 1:
            y = y * self.factor
        return self.out_proj(y * nn.functional.silu(z))


class VimBlock(nn.Module):
    """Pre-norm residual block: `hidden + mixer(norm(hidden))`."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = VimMixer(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (batch, tokens, d_model); returns it updated."""
        return hidden + self.mixer(self.norm(hidden))


class PatchEmbed(nn.Module):
    """Patches to tokens: a strided convolution, computed as a linear over unfolded patches."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        # Holds weight (d_model, in_channels, patch_size, patch_size) and bias under their public names.
        self.proj = nn.Conv2d(config.in_channels, config.d_model, config.patch_size, config.steps)

    def forward(self, images: Tensor) -> Tensor:
        """images (batch, in_channels, image_size, image_size) -> (batch, patches, d_model), row by row."""
        return embed_patches(images, self.proj)


class Vim(nn.Module):
    """Vision Mamba with a class token in the middle of the sequence and absolute position embeddings.

    Args:
        config: the model's shape.
    """

    model_type: ClassVar[str] = "mq_ao.vim"
    """`model_type` in the config.json of our own layout."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, config.d_model))
        self.layers = nn.ModuleList(VimBlock(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.head = nn.Linear(config.d_model, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as the paper's code does: dt in [1e-3, 1e-1], residual writers scaled by 1/sqrt(n_layer)."""
        for parameter in (self.cls_token, self.pos_embed, self.head.weight):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.bias)
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        for mixer in mixers:
            mixer.reset_parameters(self.config.n_layer)

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images.

        Args:
            images: (batch, in_channels, image_size, image_size), normalised as in training.

        Returns:
            logits (batch, num_classes).

        Raises:
            MqAoError: the images have another shape.
        """
        c = self.config
        if tuple(images.shape[1:]) != (c.in_channels, c.image_size, c.image_size):
            raise MqAoError(
                f"this model takes images (batch, {c.in_channels}, {c.image_size}, {c.image_size}); got "
                f"{tuple(images.shape)}."
            )
        tokens = self.patch_embed(images)
        middle = c.patches // 2
        cls = self.cls_token.expand(tokens.shape[0], -1, -1)
        hidden = torch.cat([tokens[:, :middle], cls, tokens[:, middle:]], dim=1) + self.pos_embed
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm_f(hidden)[:, middle])

    @classmethod
    def from_pretrained(cls, source: str | Path, **shape: int) -> Vim:
        """Loads `"demo"`, a folder that `save_pretrained` wrote, or a public checkpoint file; see `vim_loading.load`.

        Args:
            source: what to load.
            shape: image_size and stride of a public checkpoint file, which does not tell them.
        """
        return pretrained.read(Vim, source, **shape)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json into `folder`; see `models.saving.save_pretrained`."""
        save_pretrained(self, folder)
