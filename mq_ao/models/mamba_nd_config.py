"""Configuration of a Mamba-ND, with the names of mamba_ssm where it has one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mq_ao.errors import MqAoError
from mq_ao.models.config import check_counts, check_positive, check_rank, check_switches, resolve_rank

ORDERS = {2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (0, 2, 1), (2, 1, 0))}
"""Axes from the slowest to the fastest, by the number of axes; two blocks each, forwards and backwards."""


@dataclass(frozen=True)
class MambaNDConfig:
    """Shape of a `MambaND`.

    Attributes:
        image_size: pixels along each axis: (height, width) of images, (frames, height, width) of videos.
        patch_size: pixels of a patch along each axis.
        in_channels: colours of a pixel.
        num_classes: outputs of the head.
        d_model: width of the residual stream (D).
        n_layer: number of blocks.
        d_state: states a channel (N).
        d_conv: taps of the depthwise causal convolutions.
        expand: d_inner = expand * d_model (E).
        dt_rank: rank of the step-size projections; "auto" is ceil(d_model / 16).
        bias: whether in_proj and out_proj have a bias.
        conv_bias: whether the convolutions have a bias.
        downsample: indices of the blocks after which 2 x 2 tokens become one; images alone.
        residual_of_norm: whether a block adds to its normed input, h + mixer(h) with h = norm(x), as the public
            checkpoints do, and not to its input, x + mixer(norm(x)).
        final_norm: whether tokens are normed after the last block (ln1).
        pooled_norm: whether their mean is normed (ln2).
        norm_epsilon: epsilon of the blocks' LayerNorms.
        final_norm_epsilon: epsilon of ln1 and ln2.
    """

    image_size: tuple[int, ...] = (224, 224)
    patch_size: tuple[int, ...] = (8, 8)
    in_channels: int = 3
    num_classes: int = 1000
    d_model: int = 384
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    bias: bool = False
    conv_bias: bool = True
    downsample: tuple[int, ...] = ()
    residual_of_norm: bool = True
    final_norm: bool = True
    pooled_norm: bool = True
    norm_epsilon: float = 1e-5
    final_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "downsample"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        check_counts(self, "in_channels", "num_classes", "d_model", "n_layer", "d_state", "d_conv", "expand")
        check_rank(self)
        check_switches(self, "bias", "conv_bias", "residual_of_norm", "final_norm", "pooled_norm")
        check_positive(self, "norm_epsilon", "final_norm_epsilon")
        if len(self.image_size) not in ORDERS or len(self.patch_size) != len(self.image_size):
            raise MqAoError(
                f"image_size {self.image_size} and patch_size {self.patch_size} have to give a size for each axis: "
                "(height, width) of images or (frames, height, width) of videos."
            )
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or size < patch or size % patch:
                raise MqAoError(
                    f"image_size {self.image_size} is no whole number of patches of {self.patch_size}: change one."
                )
        self._check_downsample()

    def _check_downsample(self) -> None:
        if len(set(self.downsample)) < len(self.downsample) or not all(0 <= i < self.n_layer for i in self.downsample):
            raise MqAoError(
                f"MambaNDConfig.downsample is {self.downsample}: give different indices of blocks, below n_layer "
                f"{self.n_layer}."
            )
        if self.downsample and len(self.image_size) != 2:
            raise MqAoError("MambaNDConfig.downsample merges tokens of images alone: leave it empty for videos.")

    @property
    def d_inner(self) -> int:
        """Channels of the convolutions and of the scans (E)."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """`dt_rank` as a number."""
        return resolve_rank(self.dt_rank, self.d_model)

    @property
    def patches(self) -> int:
        """Tokens before the first block."""
        return math.prod(self.grid(0))

    def grid(self, layer: int) -> tuple[int, ...]:
        """Tokens along each axis before block `layer`; of an odd number, the last is merged with zeros."""
        grid = [size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True)]
        for _ in range(sum(index < layer for index in self.downsample)):
            grid = [-(-count // 2) for count in grid]
        return tuple(grid)

    def axes(self, layer: int) -> tuple[int, ...]:
        """Axes of the grid from the slowest to the fastest in the scan of block `layer`."""
        orders = ORDERS[len(self.image_size)]
        return orders[layer // 2 % len(orders)]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of a sequence, which is a list where it comes from JSON."""
    if not isinstance(values, list | tuple) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise MqAoError(f"MambaNDConfig.{name} is {values!r}: give whole numbers, as in (224, 224).")
    return tuple(values)


MAMBA_2D_SMALL = MambaNDConfig(downsample=(9,))
"""Shape of the public Mamba-2D-S checkpoint of images."""
MAMBA_2D_BASE = MambaNDConfig(d_model=768, downsample=(9,))
"""Shape of the public Mamba-2D-B checkpoint of images."""
MAMBA_3D_SMALL = MambaNDConfig(
    image_size=(32, 224, 224),
    patch_size=(2, 16, 16),
    num_classes=51,
    n_layer=36,
    final_norm=False,
    pooled_norm=False,
)
"""Shape of the public Mamba-3D model of 32 frames of video, for the 51 classes of HMDB-51."""
