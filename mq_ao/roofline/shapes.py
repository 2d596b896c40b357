"""Shapes of public Mamba language models, by name or from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from mq_ao.errors import MqAoError
from mq_ao.models import demo
from mq_ao.models.config import MAMBA2_130M, MAMBA_130M, Mamba2Config, MambaConfig
from mq_ao.models.layouts import read_config

SHAPES: Mapping[str, MambaConfig | Mamba2Config] = MappingProxyType(
    {
        "130m": MAMBA_130M,
        "370m": replace(MAMBA_130M, d_model=1024, n_layer=48),
        "790m": replace(MAMBA_130M, d_model=1536, n_layer=48),
        "1.4b": replace(MAMBA_130M, d_model=2048, n_layer=48),
        "2.8b": replace(MAMBA_130M, d_model=2560, n_layer=64),
        "mamba2-130m": MAMBA2_130M,
        "mamba2-2.7b": replace(MAMBA2_130M, d_model=2560, n_layer=64),
        "mamba2-8b": Mamba2Config(256000, d_model=4096, n_layer=56, ngroups=8, norm_groups=8, tie_embeddings=False),
    }
)
"""The shapes of the checkpoints of state-spaces, and of NVIDIA's mamba2-8b-3t-4k."""


def get_shape(model: str) -> MambaConfig | Mamba2Config:
    """The shape of that name, of the bundled model "demo", or of the model in a folder.

    Of a folder only config.json is read.

    Raises:
        MqAoError: there is none, or its config.json is not one of a Mamba language model.
    """
    if model in SHAPES:
        return SHAPES[model]
    if model == "demo":
        return read_config(demo.FOLDER)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return read_config(folder)
    raise MqAoError(f"unknown model {model!r}: give demo, {', '.join(SHAPES)}, or a folder with a config.json.")
