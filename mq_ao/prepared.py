"""A graph that is ready to be converted: rewritten, annotated, calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from mq_ao.quantized import QuantizedModel
from mq_ao.report import build
from mq_ao.report.summary import Report


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is known before integers take the place of observers.

    Attributes:
        graph: result of `prepare_pt2e`, calibrated.
        report: of what was rewritten and quantized.
        info: see `QuantizedModel`.
        source: see `QuantizedModel`.
    """

    graph: GraphModule
    report: Report
    info: Mapping[str, Any]
    source: build.Source

    def quantized(self, graph: GraphModule | None = None) -> QuantizedModel:
        """Converts the graph, which is edited, or another one with the same observers."""
        converted = convert_pt2e(graph or self.graph, fold_quantize=False)  # weights are integers already
        return QuantizedModel(converted, self.report, self.info, self.source)
