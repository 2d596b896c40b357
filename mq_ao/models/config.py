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
        check_counts(self, "vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand")
        check_rank(self)
        check_switches(self, "bias", "conv_bias", "tie_embeddings")
        check_positive(self, "norm_epsilon")

    @property
    def d_inner(self) -> int:
        """Channels of the convolution and of the scan (E)."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """`dt_rank` as a number."""
        return resolve_rank(self.dt_rank, self.d_model)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


def check_counts(config: object, *names: str) -> None:
    """Raises MqAoError unless these fields are whole numbers of at least 1."""
    for name in names:
        if not _is_count(value := getattr(config, name)):
            raise MqAoError(f"{type(config).__name__}.{name} is {value!r}: give a whole number of at least 1.")


def check_rank(config: object) -> None:
    """Raises MqAoError unless the field dt_rank is a count or "auto"."""
    value = config.dt_rank  # type: ignore[attr-defined]
    if value != "auto" and not _is_count(value):
        name = type(config).__name__
        raise MqAoError(f'{name}.dt_rank is {value!r}: give a whole number of at least 1, or "auto".')


def check_switches(config: object, *names: str) -> None:
    """Raises MqAoError unless these fields are booleans."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise MqAoError(f"{type(config).__name__}.{name} is {value!r}: give true or false.")


def check_positive(config: object, *names: str) -> None:
    """Raises MqAoError unless these fields are numbers above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or not value > 0:
            raise MqAoError(f"{type(config).__name__}.{name} is {value!r}: give a positive number.")


def resolve_rank(dt_rank: int | Literal["auto"], d_model: int) -> int:
    """`dt_rank` as a number; "auto" is ceil(d_model / 16)."""
    return math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


MAMBA_130M = MambaConfig(vocab_size=50280, d_model=768, n_layer=24)
"""Shape of the public mamba-130m checkpoints."""
