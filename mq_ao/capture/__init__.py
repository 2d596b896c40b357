"""A model becomes an ExportedProgram over aten and mq_ao operators."""

from __future__ import annotations

from mq_ao.capture.mamba_ssm import import_mamba_ssm
from mq_ao.capture.program import export

__all__ = ["export", "import_mamba_ssm"]
