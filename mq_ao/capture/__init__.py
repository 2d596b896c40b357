"""A model becomes an ExportedProgram over aten and mq_ao operators."""

from __future__ import annotations

from mq_ao.capture.by_hand import using_scans
from mq_ao.capture.exporting import export
from mq_ao.capture.mamba_ssm import import_mamba_ssm
from mq_ao.capture.reading import SelectiveScan

__all__ = ["SelectiveScan", "export", "import_mamba_ssm", "using_scans"]
