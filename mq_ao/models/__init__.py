"""Exportable reference models that load public checkpoints."""

from __future__ import annotations

from mq_ao.models.config import MAMBA_130M, MambaConfig
from mq_ao.models.generate import Sampling, generate, stream
from mq_ao.models.mamba import MambaLM

__all__ = ["MAMBA_130M", "MambaConfig", "MambaLM", "Sampling", "generate", "stream"]
