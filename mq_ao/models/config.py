"""Configurations of Mamba language models, with the names of mamba_ssm."""

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
        known_tokens: tokens that the tokenizer knows, the first ones of `vocab_size`, whose rest is padding; None:
            all, or not known.
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
    known_tokens: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand")
        check_rank(self)
        check_switches(self, "bias", "conv_bias", "tie_embeddings")
        check_positive(self, "norm_epsilon")
        check_known_tokens(self)

    @property
    def d_inner(self) -> int:
        """Channels of the convolution and of the scan (E)."""
        return self.expand * self.d_model

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution."""
        return self.d_inner

    @property
    def ssm_shape(self) -> tuple[int, ...]:
        """Shape of one block's scan state without the batch: (d_inner, d_state)."""
        return self.d_inner, self.d_state

    @property
    def rank(self) -> int:
        """`dt_rank` as a number."""
        return resolve_rank(self.dt_rank, self.d_model)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mamba2Config:
    """Shape of a `Mamba2LM`, with the names of mamba_ssm.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        d_model: width of the residual stream (D).
        n_layer: number of blocks.
        d_state: states a channel (N).
        d_conv: taps of the depthwise causal convolution.
        expand: d_inner = expand * d_model (E).
        headdim: channels of a head.
        ngroups: groups of heads that share B and C.
        D_has_hdim: whether the skip connection D has a value a channel instead of one a head.
        dt_min: smallest step size.
        dt_max: largest step size; None: there is none.
        norm_groups: groups of channels that the gated norm normalises each on its own.
        norm_before_gate: whether the gate comes after that norm.
        bias: whether in_proj and out_proj have a bias.
        conv_bias: whether the convolution has a bias.
        norm_epsilon: epsilon of every RMSNorm.
        tie_embeddings: whether the head uses the embedding's weight.
        known_tokens: tokens that the tokenizer knows, the first ones of `vocab_size`, whose rest is padding; None:
            all, or not known.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    D_has_hdim: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    norm_groups: int = 1
    norm_before_gate: bool = False
    bias: bool = False
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    known_tokens: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand", "headdim", "ngroups")
        check_counts(self, "norm_groups")
        check_switches(self, "D_has_hdim", "norm_before_gate", "bias", "conv_bias", "tie_embeddings")
        check_positive(self, "norm_epsilon")
        check_known_tokens(self)
        if self.d_inner % self.headdim:
            raise MqAoError(f"d_inner {self.d_inner} cannot be divided into heads of {self.headdim}: change headdim.")
        for name, whole in (("ngroups", self.heads), ("norm_groups", self.d_inner)):
            if whole % getattr(self, name):
                raise MqAoError(f"Mamba2Config.{name} is {getattr(self, name)}, which does not divide {whole}.")
        if isinstance(self.dt_min, bool) or not isinstance(self.dt_min, int | float) or not 0 <= self.dt_min < math.inf:
            raise MqAoError(f"Mamba2Config.dt_min is {self.dt_min!r}: give a number of at least 0.")
        if self.dt_max is not None and not (isinstance(self.dt_max, int | float) and self.dt_max > self.dt_min):
            raise MqAoError(f"Mamba2Config.dt_max is {self.dt_max!r}: give a number above dt_min, or none.")

    @property
    def d_inner(self) -> int:
        """Channels of the scan (E)."""
        return self.expand * self.d_model

    @property
    def heads(self) -> int:
        """Heads of the scan."""
        return self.d_inner // self.headdim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def ssm_shape(self) -> tuple[int, ...]:
        """Shape of one block's scan state without the batch: (heads, headdim, d_state)."""
        return self.heads, self.headdim, self.d_state

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


def check_known_tokens(config: MambaConfig | Mamba2Config) -> None:
    """Raises MqAoError unless known_tokens is None or a count within the vocabulary."""
    if config.known_tokens is None:
        return
    check_counts(config, "known_tokens")
    if config.known_tokens > config.vocab_size:
        name = type(config).__name__
        raise MqAoError(
            f"{name}.known_tokens is {config.known_tokens}, more than the vocab_size of {config.vocab_size}: it counts "
            "the tokens that are no padding."
        )


def check_positive(config: object, *names: str) -> None:
    """Raises MqAoError unless these fields are finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise MqAoError(f"{type(config).__name__}.{name} is {value!r}: give a positive number.")


def resolve_rank(dt_rank: int | Literal["auto"], d_model: int) -> int:
    """`dt_rank` as a number; "auto" is ceil(d_model / 16)."""
    return math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


MAMBA_130M = MambaConfig(vocab_size=50280, d_model=768, n_layer=24)
"""Shape of the public mamba-130m checkpoints."""
MAMBA2_130M = Mamba2Config(vocab_size=50288, d_model=768, n_layer=24)
"""Shape of the public mamba2-130m checkpoints."""
