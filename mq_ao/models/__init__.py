"""Exportable reference models that load public checkpoints."""

from __future__ import annotations

from mq_ao.models import loading, mamba_nd_loading, vim_loading  # noqa: F401  (enter themselves for from_pretrained)
from mq_ao.models.config import MAMBA2_130M, MAMBA_130M, Mamba2Config, MambaConfig
from mq_ao.models.generate import Sampling, generate, stream
from mq_ao.models.mamba import MambaLM
from mq_ao.models.mamba2 import Mamba2LM, language_model
from mq_ao.models.mamba_nd import MambaND
from mq_ao.models.mamba_nd_config import MAMBA_2D_BASE, MAMBA_2D_SMALL, MAMBA_3D_SMALL, MambaNDConfig
from mq_ao.models.transformers_loading import Logits, load
from mq_ao.models.vim import Vim
from mq_ao.models.vision_config import VIM_BASE, VIM_SMALL, VIM_TINY, VimConfig

__all__ = [
    "MAMBA2_130M",
    "MAMBA_2D_BASE",
    "MAMBA_2D_SMALL",
    "MAMBA_3D_SMALL",
    "MAMBA_130M",
    "VIM_BASE",
    "VIM_SMALL",
    "VIM_TINY",
    "Logits",
    "Mamba2Config",
    "Mamba2LM",
    "MambaConfig",
    "MambaLM",
    "MambaND",
    "MambaNDConfig",
    "Sampling",
    "Vim",
    "VimConfig",
    "generate",
    "language_model",
    "load",
    "stream",
]
