"""Configuration of a Mamba-1 language model, with the names of mamba_ssm."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mq_ao.errors import MqAoError


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a `MambaLM`.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        d_model: width of the residual stream (D).
        n_layer: number of blocks.
        d_state: states a channel (N).
        d_conv: taps of the depthwise causal convolution.
        expand: d_inner = expand * d_model (E).
        dt_rank: rank of the step-size projection; "auto" is ceil(d_model / 16).
        bias: whether in_proj and out_proj have a bias.
        conv_bias: whether the convolution has a bias.
        norm_epsilon: epsilon of every RMSNorm.
        tie_embeddings: whether the head uses the embedding's weight.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    bias: bool = False
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand"):
            value = getattr(self, name)
            if not _is_count(value):
                raise MqAoError(f"MambaConfig.{name} is {value!r}: give a whole number of at least 1.")
        if self.dt_rank != "auto" and not _is_count(self.dt_rank):
            raise MqAoError(f'MambaConfig.dt_rank is {self.dt_rank!r}: give a whole number of at least 1, or "auto".')
        for name in ("bias", "conv_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise MqAoError(f"MambaConfig.{name} is {getattr(self, name)!r}: give true or false.")
        if not isinstance(self.norm_epsilon, int | float) or not self.norm_epsilon > 0:
            raise MqAoError(f"MambaConfig.norm_epsilon is {self.norm_epsilon!r}: give a positive number.")

    @property
    def d_inner(self) -> int:
        """Channels of the convolution and of the scan (E)."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """`dt_rank` as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


MAMBA_130M = MambaConfig(vocab_size=50280, d_model=768, n_layer=24)
"""Shape of the public mamba-130m checkpoints."""
