"""Exportable reference models that load public checkpoints."""

from __future__ import annotations

from mq_ao.models.config import MAMBA_130M, MambaConfig
from mq_ao.models.generate import Sampling, generate, stream
from mq_ao.models.mamba import MambaLM
from mq_ao.models.vim import Vim
from mq_ao.models.vision_config import VIM_BASE, VIM_SMALL, VIM_TINY, VimConfig

__all__ = [
    "MAMBA_130M",
    "VIM_BASE",
    "VIM_SMALL",
    "VIM_TINY",
    "MambaConfig",
    "MambaLM",
    "Sampling",
    "Vim",
    "VimConfig",
    "generate",
    "stream",
]
