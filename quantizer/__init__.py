"""Quantizer for Mamba-family graphs in torchao's pt2e flow."""

from __future__ import annotations

from mq_ao.quantizer.mamba_quantizer import MambaQuantizer
from mq_ao.quantizer.report import Decision, QuantizationReport
from mq_ao.quantizer.specs import Activation, QuantizationConfig, Range, RoleSpec, Rounding, w8a8

__all__ = [
    "Activation",
    "Decision",
    "MambaQuantizer",
    "QuantizationConfig",
    "QuantizationReport",
    "Range",
    "RoleSpec",
    "Rounding",
    "w8a8",
]
