"""The roofline plot of a measured program: how fast each operator runs for the operations that it does on a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mq_ao.plots import write_figure
from mq_ao.roofline.machine import Peaks
from mq_ao.roofline.measured import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00")  # apart for every kind of colour vision
_NAMED = 0.04
"""Share of a phase's time from which an operator is named."""


def save_plot(phases: Mapping[str, Sequence[Line]], peaks: Peaks, path: Path) -> None:
    """Draws the lines of phases, and saves them as PNG or SVG, by the suffix.

    Args:
        phases: of `measured.lines`, by title.
        peaks: of the machine.
        path: file to write.

    Raises:
        MqAoError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [line for lines in phases.values() for line in lines if line.cost.operations]
    _roof(axes, [line.cost.operations / line.cost.moved for line in shown], peaks)
    for colour, (title, lines) in zip(_COLOURS, phases.items(), strict=False):
        whole = sum(line.seconds for line in lines)
        for index, line in enumerate(line for line in lines if line.cost.operations):
            at = line.cost.operations / line.cost.moved, line.cost.operations / line.seconds / 1e9
            share = line.seconds / whole
            label = title if index == 0 else None
            axes.scatter(*at, s=10 + 1500 * share, color=colour, alpha=0.6, linewidth=0, label=label)
            if share >= _NAMED:
                name = f"{line.operator.partition('.')[2]}, {line.shape}"
                axes.annotate(name, at, xytext=(6, -10), textcoords="offset points", fontsize=6.5)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="giga-operations a second")
    axes.grid(visible=True, which="both", linewidth=0.3, alpha=0.5)
    axes.legend(loc="lower right", title="areas are shares of the time", markerscale=0.4)
    write_figure(figure, path, dpi=120)


def _roof(axes: Axes, intensities: Sequence[float], peaks: Peaks) -> None:
    least, most = min(intensities) / 2, 20 * max(intensities)  # room for the last names
    for name, peak, beside in (("int8", peaks.int8, "bottom"), ("float32", peaks.fp32, "top")):
        ridge = peak / peaks.bandwidth
        xs = [least, ridge, most] if least < ridge < most else [least, most]
        axes.plot(xs, [min(peak, x * peaks.bandwidth) / 1e9 for x in xs], color="0.3", linewidth=1)
        what = f"{name} products, {peak / 1e9:.0f} GOP/s"
        axes.annotate(what, (1.2 * ridge, peak / 1e9), fontsize=8, ha="left", va=beside)
    middle = (least * min(most, peaks.fp32 / peaks.bandwidth)) ** 0.5
    at = middle, middle * peaks.bandwidth / 1e9
    axes.annotate(f"memory, {peaks.bandwidth / 1e9:.1f} GB/s", at, fontsize=8, ha="right", va="bottom")
