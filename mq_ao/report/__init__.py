"""The HTML report of a quantization: a plain data model, rendered to one self-contained page by `mq_ao.report.page`."""

from __future__ import annotations

from mq_ao.report.data import NodeQuality, PageData, RangeRow, Size, VarianceProfile

__all__ = [
    "NodeQuality",
    "PageData",
    "RangeRow",
    "Size",
    "VarianceProfile",
]
