"""The cost and the divergence against the steps, one line a width of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mq_ao.ablation.run import Row
from mq_ao.ablation.steps import Group
from mq_ao.plots import check_plot, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {8: "#0072b2", 4: "#d55e00"}  # apart for every kind of colour vision
_MARKERS = {8: "o", 4: "s"}
_SMALLEST = 1e-9
"""Where a divergence of zero is drawn on the log axis."""
_FAR = 0.1
"""Relative change of the cost above which a linear axis would hide the small ones."""


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws rows and saves them as PNG or SVG, by the suffix.

    Args:
        rows: of `ablate`; hollow markers are transforms by themselves.
        path: file to write.

    Raises:
        MqAoError: the suffix is neither, matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    shown = [row for row in rows if row.group is not Group.ALONE]
    places = {place: index for index, place in enumerate(dict.fromkeys((row.group, row.name) for row in shown))}
    figure = Figure(figsize=(max(7.0, 0.55 * len(places) + 2), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw(upper, rows, places, lambda row: 100 * row.measured.change)
    upper.set_ylabel("cost of the text against float, %")
    upper.axhline(0, color="0.6", linewidth=0.8)
    if max(abs(row.measured.change) for row in rows) > _FAR:
        upper.set_yscale("symlog", linthresh=1)
        upper.yaxis.set_major_formatter(ScalarFormatter())
    _draw(lower, rows, places, lambda row: max(row.measured.mean_divergence, _SMALLEST))
    lower.set_ylabel("mean KL to float, nats")
    lower.set_yscale("log")
    lower.set_xticks(range(len(places)), [name for _, name in places], rotation=45, ha="right", rotation_mode="anchor")
    upper.legend(frameon=False)
    write_figure(figure, path)


def _draw(
    axes: Axes, rows: Sequence[Row], places: Mapping[tuple[Group, str], int], value: Callable[[Row], float]
) -> None:
    for bits in dict.fromkeys(row.bits for row in rows):
        ours = [row for row in rows if row.bits == bits]
        colour, marker = _COLOURS[bits], _MARKERS[bits]
        for group in (Group.BASELINE, Group.CHAIN, Group.STATE):
            points = [(places[group, row.name], value(row)) for row in ours if row.group is group]
            label = f"W{bits}A8" if group is Group.CHAIN else None
            # Only the chain's neighbours differ by one transform; elsewhere a line would say too much.
            line = "-" if group is Group.CHAIN else "none"
            axes.plot(*_columns(points), color=colour, marker=marker, linestyle=line, label=label)
        alone = [(places[Group.CHAIN, row.name], value(row)) for row in ours if row.group is Group.ALONE]
        label = f"W{bits}A8, that transform alone"
        axes.plot(*_columns(alone), color=colour, marker=marker, markerfacecolor="none", linestyle="none", label=label)
    for group in (Group.CHAIN, Group.STATE):
        first = min((place for (other, _), place in places.items() if other is group), default=0)
        if first:
            axes.axvline(first - 0.5, color="0.8", linewidth=0.8)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
