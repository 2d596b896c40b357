"""How large the outliers are that a model has by nature: channels of linears' inputs, and of the states that meet C.

Examples:

    python examples/outliers.py demo --text mq_ao/models/demo/calibration.txt

    python examples/outliers.py runs/lm/model --text runs/lm/model/calibration.txt --tokens 8192
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.fx import GraphModule

from mq_ao.api import capture
from mq_ao.cli.console import out, step
from mq_ao.graph import match, walk
from mq_ao.graph.views import Layer
from mq_ao.models import MambaLM
from mq_ao.opening import open_float
from mq_ao.statistics import ChannelStatistics, Request, collect
from mq_ao.statistics.accumulators import bin_centres
from mq_ao.statistics.probe import flat_states_name
from mq_ao.text import calibration_batches, codec_for, read_tokens


@dataclass(frozen=True)
class Outliers:
    """Of one value over all tokens.

    Attributes:
        peak: largest |x|.
        ratio: `peak` over the median of the channels' largest |x|.
        kurtosis: excess kurtosis of all values about zero, 0 for a normal distribution; from a histogram whose bins are
            an eighth of an octave wide.
    """

    peak: float
    ratio: float
    kurtosis: float


def outliers_of(statistics: ChannelStatistics) -> Outliers:
    """Of statistics with a histogram."""
    maximum = statistics.maximum
    assert statistics.histogram is not None
    counts, centres = statistics.histogram.sum(0)[:-1], bin_centres()[:-1]
    second, fourth = ((counts * centres**power).sum() / counts.sum() for power in (2, 4))
    # A channel that is always zero has no part in what is usual.
    typical = maximum[maximum > 0].median()
    return Outliers(maximum.max().item(), (maximum.max() / typical).item(), (fourth / second**2 - 3).item())


def sites(graph: GraphModule) -> Iterator[tuple[str, str]]:
    """What is looked at: a word for it, and the name of the node in statistics."""
    blocks = match(graph).blocks
    for block in blocks:
        yield "input of in_proj", Layer.of(block.in_proj).x.name
        for direction in block.directions:
            if direction.scan.target in walk.SCAN:
                yield "states h, in h C", flat_states_name(direction.scan)
        yield "input of out_proj", Layer.of(block.out_proj).x.name


def measure(model: MambaLM, batches: list[torch.Tensor]) -> dict[str, list[Outliers]]:
    """Outliers by site, a value a layer."""
    graph = capture(model, ())
    named = list(sites(graph))
    inputs = [(batch, *model.initial_states(len(batch))) for batch in batches]
    statistics = collect(graph, [Request(name, quantiles=True) for _, name in named], inputs, progress=True)
    found: dict[str, list[Outliers]] = {}
    for what, name in named:
        found.setdefault(what, []).append(outliers_of(statistics[name]))
    return found


def main(
    model: Annotated[str, typer.Argument(help='"demo", a folder, or a hub id.')],
    text: Annotated[Path, typer.Option(help="Text to run on.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run on.")] = 4096,
) -> None:
    """Prints, for the layers together, how far the largest channel stands out of the others."""
    loaded = open_float(model, step)
    vocab_size = loaded.config.vocab_size
    read = read_tokens(text, vocab_size, codec_for(vocab_size, source=model))
    found = measure(loaded, calibration_batches(read, tokens, 512, 4))
    table = Table(title=f"{model}: outliers, median over the layers, and largest")
    for heading in ("", "largest |x|", "largest / median channel", "excess kurtosis"):
        table.add_column(heading, justify="left" if not heading else "right")
    for what, layers in found.items():
        cells = []
        for values in ([v.peak for v in layers], [v.ratio for v in layers], [v.kurtosis for v in layers]):
            cells.append(f"{median(values):.1f}, {max(values):.1f}")
        table.add_row(what, *cells)
    out().print(table)


if __name__ == "__main__":
    typer.run(main)
