"""Ablation: one transform more at a time, everything else fixed, and each transform by itself."""

from __future__ import annotations

from mq_ao.ablation.plot import save_plot
from mq_ao.ablation.run import Row, ablate
from mq_ao.ablation.steps import Group, Step, all_steps

__all__ = ["Group", "Row", "Step", "ablate", "all_steps", "save_plot"]
