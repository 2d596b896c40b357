"""A float graph that was rewritten, and becomes ready for conversion in any number of ways."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from mq_ao.calibration import Calibration, calibrate
from mq_ao.graph.partial import Batch
from mq_ao.memory import release
from mq_ao.prepared import Prepared
from mq_ao.quantizer import MambaQuantizer
from mq_ao.recipe import Recipe
from mq_ao.report import build
from mq_ao.report.summary import Report
from mq_ao.statistics import ChannelStatistics, collect


@dataclass(frozen=True, eq=False)
class Rewritten:
    """What is known before a quantizer has annotated anything.

    Attributes:
        graph: rewritten float graph; `prepare_pt2e` edits it.
        batches: calibration data, positional inputs of the graph; read once, unless it is a list.
        calibration: where they come from.
        report: of the rewrites.
        info: see `QuantizedModel`.
        source: see `QuantizedModel`.
    """

    graph: GraphModule
    batches: Iterable[Batch]
    calibration: Calibration
    report: Report
    info: Mapping[str, Any]
    source: build.Source

    def copied(self) -> Rewritten:
        """The same, with a graph of its own to edit, on the same tensors."""
        return replace(self, graph=GraphModule(self.graph, copy.deepcopy(self.graph.graph)))

    def statistics(self, quantizer: MambaQuantizer, progress: bool = False) -> Mapping[str, ChannelStatistics]:
        """What a quantizer needs for roundings that learn and for carried states; empty if it needs nothing."""
        requests = quantizer.requests(self.graph)
        return collect(self.graph, requests, self.batches, progress=progress) if requests else {}

    def prepared(
        self,
        recipe: Recipe,
        quantizer: MambaQuantizer,
        statistics: Mapping[str, ChannelStatistics],
        progress: bool = False,
    ) -> Prepared:
        """Annotates the graph, which is edited, and calibrates it.

        Args:
            recipe: for the report.
            quantizer: what annotates.
            statistics: what it needs, see `statistics`; of more it sees nothing.
            progress: show progress bars on stderr.
        """
        asked = {request.node for request in quantizer.requests(self.graph)}
        quantizer.set_statistics({name: found for name, found in statistics.items() if name in asked})
        prepared = prepare_pt2e(self.graph, quantizer)
        release()
        count = calibrate(prepared, self.batches, progress=progress)
        report = replace(
            self.report,
            recipe=recipe,
            quantization=quantizer.report,
            batches=count,
            tokens=self.calibration.tokens,
        )
        return Prepared(prepared, report, self.info, self.source)
