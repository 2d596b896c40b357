"""Configuration of a Vision Mamba (Vim), with the names of mamba_ssm where it has one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mq_ao.errors import MqAoError
from mq_ao.models.config import check_counts, check_positive, check_rank, check_switches, resolve_rank


@dataclass(frozen=True)
class VimConfig:
    """Shape of a `Vim`.

    Attributes:
        image_size: pixels of each side of the square images.
        patch_size: pixels of each side of a patch.
        stride: pixels between neighbouring patches; None: patch_size, so that they do not overlap.
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
        norm_epsilon: epsilon of every RMSNorm.
        mean_of_directions: whether the mean of both directions is gated, as the public checkpoints do, and not their
            sum.
    """

    image_size: int = 224
    patch_size: int = 16
    stride: int | None = None
    in_channels: int = 3
    num_classes: int = 1000
    d_model: int = 192
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    bias: bool = False
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
    mean_of_directions: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "image_size", "patch_size", "in_channels", "num_classes", "d_model", "n_layer", "d_state")
        check_counts(self, "d_conv", "expand", *([] if self.stride is None else ["stride"]))
        check_rank(self)
        check_switches(self, "bias", "conv_bias", "mean_of_directions")
        check_positive(self, "norm_epsilon")
        if self.patch_size > self.image_size:
            raise MqAoError(
                f"a patch of {self.patch_size} pixels does not fit into an image of {self.image_size}: give a smaller "
                "patch_size."
            )

    @property
    def d_inner(self) -> int:
        """Channels of the convolutions and of the scans (E)."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """`dt_rank` as a number."""
        return resolve_rank(self.dt_rank, self.d_model)

    @property
    def steps(self) -> int:
        """Pixels between neighbouring patches, `stride` as a number."""
        return self.patch_size if self.stride is None else self.stride

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return (self.image_size - self.patch_size) // self.steps + 1

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


VIM_TINY = VimConfig()
"""Shape of the public Vim-T checkpoints (224 pixels, patches of 16)."""
VIM_SMALL = VimConfig(d_model=384)
"""Shape of the public Vim-S checkpoints."""
VIM_BASE = VimConfig(d_model=768)
"""Shape of the public Vim-B checkpoints."""
