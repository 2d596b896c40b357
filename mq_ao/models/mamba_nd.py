"""Mamba-ND (Li, Singh and Grover, 2024): a classifier of images and videos that exports.

A block is a Mamba-1 block; what alternates from block to block is the order in which it reads the tokens. Parameter
names are those of the public checkpoints without `backbone.`, but for the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mq_ao.errors import MqAoError
from mq_ao.models import pretrained
from mq_ao.models.mamba import MambaMixer
from mq_ao.models.mamba_nd_config import MambaNDConfig
from mq_ao.models.patches import embed_patches
from mq_ao.models.saving import save_pretrained


@dataclass(frozen=True)
class ScanOrder:
    """The order in which a block reads a grid of tokens.

    Attributes:
        grid: tokens along each axis; in the stream, the last axis runs fastest.
        axes: axes of the grid from the slowest to the fastest.
        backward: whether the sequence is read from its end.
    """

    grid: tuple[int, ...]
    axes: tuple[int, ...]
    backward: bool

    def arranged(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, tokens, d_model) of the stream in the order of the scan."""
        tokens = _permuted(tokens, self.grid, self.axes)
        return tokens.flip(1) if self.backward else tokens

    def restored(self, tokens: Tensor) -> Tensor:
        """The inverse of `arranged`."""
        tokens = tokens.flip(1) if self.backward else tokens
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return _permuted(tokens, [self.grid[axis] for axis in self.axes], inverse)


def _permuted(tokens: Tensor, grid: Any, axes: Any) -> Tensor:
    """Tokens (batch, tokens, d_model) of a grid, with its axes in this order."""
    if list(axes) == sorted(axes):
        return tokens
    last = len(axes)
    return tokens.unflatten(1, list(grid)).permute(0, *(1 + axis for axis in axes), 1 + last).flatten(1, last)


class PatchMerging(nn.Module):
    """Four tokens become one: norm and linear over a square of 2 x 2; an odd grid is filled up with zeros."""

    def __init__(self, config: MambaNDConfig, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * config.d_model, eps=config.norm_epsilon)
        self.reduction = nn.Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, height * width, d_model) -> (batch, ceil(height / 2) * ceil(width / 2), d_model)."""
        height, width = self.grid
        squares = tokens.unflatten(1, [height, width])
        if height % 2 or width % 2:
            squares = nn.functional.pad(squares, (0, 0, 0, width % 2, 0, height % 2))
        # The four values of a channel lie side by side.
        squares = squares.unflatten(2, [-1, 2]).unflatten(1, [-1, 2]).permute(0, 1, 3, 5, 2, 4)
        return self.reduction(self.norm(squares.flatten(3).flatten(1, 2)))


class PatchEmbed(nn.Module):
    """Patches to tokens: a strided convolution, computed as a linear over unfolded patches."""

    def __init__(self, config: MambaNDConfig) -> None:
        super().__init__()
        kind: Any = nn.Conv2d if len(config.patch_size) == 2 else nn.Conv3d
        # Holds weight (d_model, in_channels, *patch_size) and bias under their public names.
        self.projection = kind(config.in_channels, config.d_model, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, in_channels, *image_size) -> (batch, patches, d_model)."""
        return embed_patches(pixels, self.projection)


class MambaNDBlock(nn.Module):
    """Block `index`: norm, a Mamba-1 mixer in this block's order, residual; then, where asked for, a merging."""

    def __init__(self, config: MambaNDConfig, index: int) -> None:
        super().__init__()
        self.residual_of_norm = config.residual_of_norm
        self.order = ScanOrder(config.grid(index), config.axes(index), index % 2 == 1)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = MambaMixer(config)
        merging = PatchMerging(config, config.grid(index)) if index in config.downsample else None
        self.down_sample_layer = merging

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, tokens, d_model); returns them updated."""
        # The norm comes after the change of order, as in the public code: in_proj then reads it directly.
        normed = self.norm(self.order.arranged(tokens))
        mixed, _, _ = self.mixer(normed)
        restored = self.order.restored
        tokens = restored(normed + mixed) if self.residual_of_norm else tokens + restored(mixed)
        return tokens if self.down_sample_layer is None else self.down_sample_layer(tokens)


class MambaND(nn.Module):
    """Mamba-ND: blocks read tokens forwards and backwards, by turns along every axis; the head reads their mean.

    Of the rotations, R1 depends on the form of the residual. In the usual form, x + mixer(norm(x)), the stream is
    rotated: LayerNorms become RMSNorms without weight, and the changes of order leave channels in place. A merging of
    tokens, whose norm is over four of them, ends a stream: the one before it stays, the one after it is rotated. The
    last stream stays where both ln1 and ln2 are there, as no linear between them could take ln1's weight. With
    `residual_of_norm`, as in the public checkpoints, each norm's weight is part of the stream itself: R1 is left out,
    and the blocks' norms are neither folded nor smoothed. All other rewrites are the same in both.

    Args:
        config: the model's shape.
    """

    model_type: ClassVar[str] = "mq_ao.mamba_nd"
    """`model_type` in the config.json of our own layout."""

    def __init__(self, config: MambaNDConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, config.d_model))
        self.layers = nn.ModuleList(MambaNDBlock(config, index) for index in range(config.n_layer))
        self.ln1 = nn.LayerNorm(config.d_model, eps=config.final_norm_epsilon) if config.final_norm else None
        self.ln2 = nn.LayerNorm(config.d_model, eps=config.final_norm_epsilon) if config.pooled_norm else None
        self.head = nn.Linear(config.d_model, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as mamba_ssm does: dt in [1e-3, 1e-1], residual writers scaled by 1/sqrt(n_layer)."""
        for parameter in (self.pos_embed, self.head.weight):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.bias)
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        for mixer in mixers:
            mixer.reset_parameters(self.config.n_layer)

    def forward(self, pixels: Tensor) -> Tensor:
        """Classifies images or videos.

        Args:
            pixels: (batch, in_channels, *image_size), normalised as in training.

        Returns:
            logits (batch, num_classes).

        Raises:
            MqAoError: the pixels have another shape.
        """
        wanted = (self.config.in_channels, *self.config.image_size)
        if tuple(pixels.shape[1:]) != wanted:
            sizes = ", ".join(map(str, wanted))
            raise MqAoError(f"this model takes pixels (batch, {sizes}); got {tuple(pixels.shape)}.")
        tokens = self.patch_embed(pixels) + self.pos_embed
        for layer in self.layers:
            tokens = layer(tokens)
        if self.ln1 is not None:
            tokens = self.ln1(tokens)
        pooled = tokens.mean(1)
        return self.head(pooled if self.ln2 is None else self.ln2(pooled))

    @classmethod
    def from_pretrained(cls, source: str | Path, **shape: Any) -> MambaND:
        """Loads a folder that `save_pretrained` wrote or a public checkpoint file; see `mamba_nd_loading.load`.

        Args:
            source: what to load.
            shape: image_size and residual_of_norm of a public checkpoint file, which does not tell them.
        """
        return pretrained.read(MambaND, source, **shape)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json into `folder`; see `models.saving.save_pretrained`."""
        save_pretrained(self, folder)
