"""Geometry of the page's plots.

Positions are percentages of a plot's width and height, from its top left corner, so that plots stretch with the page
while their text keeps its size; the template draws them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mq_ao.extras import needs
from mq_ao.report.data import NodeQuality, RangeRow, VarianceProfile

with needs("the page of a report", extra="report"):
    from matplotlib.image import imsave
    from matplotlib.ticker import LogLocator, MaxNLocator

Floats = NDArray[np.float64]

MAX_COLUMNS = 256
"""Columns of a heat map, and points of a curve."""

_VARIANCE_DECADES = 8
_RANGE_DECADES = 4
_COLOURS = "viridis"  # even steps in lightness: reads the same on light and dark pages, and without colour vision


@dataclass(frozen=True)
class Tick:
    """A label on an axis, `at` percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line through the unit square of 100 x 100; `kind` names its colour."""

    kind: str
    points: str


@dataclass(frozen=True)
class VariancePlot:
    """Sorted channel variances of one place, each curve over its own mean."""

    where: str
    channels: int
    curves: tuple[Curve, ...]
    ratios: tuple[tuple[str, str], ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class HeatMapRow:
    """One layer of a heat map: `at` is the middle of the row, `peak` the largest channel over the median one."""

    at: float
    label: str
    peak: str
    description: str


@dataclass(frozen=True)
class HeatMap:
    """Channel maxima of one role: layers down, channels across."""

    role: str
    pattern: str
    rows: tuple[HeatMapRow, ...]
    row_height: float
    label_step: int
    channels: str
    image: str
    scale_image: str
    scale: tuple[Tick, ...]


@dataclass(frozen=True)
class Mark:
    """One node of the quality plot."""

    x: float
    y: float
    description: str


@dataclass(frozen=True)
class RoleMarks:
    """Nodes of one role; `style` numbers its colour and shape."""

    role: str
    style: int
    marks: tuple[Mark, ...]
    points: str


@dataclass(frozen=True)
class QualityPlot:
    """SQNR of every node with a finite one, in graph order."""

    roles: tuple[RoleMarks, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def number(value: float) -> str:
    """Three significant digits; very large and very small numbers as 1.2e5."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if 1e3 <= abs(value) < 1e5:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def ratio(values: Tensor) -> float:
    """Largest over smallest value of a (channels,) tensor; Inf where the smallest is 0, NaN where all are."""
    low, high = float(values.min()), float(values.max())
    return high / low if low > 0 else (math.inf if high > 0 else math.nan)


def variance_plots(profiles: Sequence[VarianceProfile]) -> list[VariancePlot]:
    """One plot a profile, all on the same logarithmic axis, so that they can be compared."""
    named = [[(kind, _over_mean(values)) for kind, values in _stages(profile)] for profile in profiles]
    low, high = _log_range((values for curves in named for _, values in curves), _VARIANCE_DECADES)
    ticks = _log_ticks(low, high, 5, flip=True)
    return [
        VariancePlot(
            profile.where,
            profile.before.numel(),
            tuple(Curve(kind, _sorted_curve(values, low, high)) for kind, values in curves),
            tuple((kind, _ratio_text(values)) for kind, values in _stages(profile)),
            ticks,
        )
        for profile, curves in zip(profiles, named, strict=True)
    ]


def heat_maps(rows: Sequence[RangeRow]) -> list[HeatMap]:
    """One heat map a role, in order of first appearance."""
    roles = dict.fromkeys(row.role for row in rows)
    return [_heat_map(role, [row for row in rows if row.role == role]) for role in roles]


def quality_plot(nodes: Sequence[NodeQuality]) -> QualityPlot | None:
    """The plot, or None where no node has a finite SQNR."""
    shown = [node for node in nodes if math.isfinite(node.sqnr)]
    if not shown:
        return None
    values = [node.sqnr for node in shown]
    ticks = MaxNLocator(nbins=6, min_n_ticks=3).tick_values(min(values) - 1, max(values) + 1)
    low, high = float(ticks[0]), float(ticks[-1])
    roles = []
    for style, role in enumerate(dict.fromkeys(node.role for node in shown)):
        marks = tuple(
            Mark(_middle(index, len(shown)), 100 * (high - node.sqnr) / (high - low), _describe_node(node))
            for index, node in enumerate(shown)
            if node.role == role
        )
        roles.append(RoleMarks(role, style, marks, _points((mark.x, mark.y) for mark in marks)))
    y_ticks = tuple(Tick(100 * (high - float(tick)) / (high - low), number(float(tick))) for tick in ticks)
    return QualityPlot(tuple(roles), _layer_ticks(shown), y_ticks)


def _stages(profile: VarianceProfile) -> list[tuple[str, Tensor]]:
    stages = (("before", profile.before), ("hadamard", profile.hadamard), ("rotated", profile.rotated))
    return [(kind, values) for kind, values in stages if values is not None]


def _ratio_text(values: Tensor) -> str:
    value = ratio(values)
    if math.isinf(value):
        return f"inf ({int((values == 0).sum())} dead)"
    # A flat profile is judged by its distance from 1 (the bound is 1.01), which three digits would hide.
    return f"{value:.4f}" if value < 1.1 else number(value)


def _array(values: Tensor) -> Floats:
    return values.detach().cpu().double().numpy()


def _over_mean(values: Tensor) -> Floats:
    array = _array(values)
    return array / (array.mean() or 1.0)


def _log_range(arrays: Iterable[Floats], decades: int) -> tuple[float, float]:
    """Ends of a logarithmic axis: at least a decade and a bit, at most `decades` long; dead channels do not count."""
    values = np.concatenate(list(arrays))
    alive = values[values > 0]
    if alive.size == 0:
        return 0.1, 10.0
    high = float(alive.max())
    low = max(float(alive.min()), high / 10.0**decades)
    room = max(0.05, (1 - math.log10(high / low)) / 2)
    return low / 10**room, high * 10**room


def _position(values: Floats | float, low: float, high: float) -> Floats:
    """Percent from the low end of a logarithmic axis; what lies outside is put on its end."""
    inside = np.clip(np.asarray(values, dtype=np.float64), low, high)
    return 100 * np.log10(inside / low) / math.log10(high / low)


def _log_ticks(low: float, high: float, count: int, *, flip: bool) -> tuple[Tick, ...]:
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    ticks = [float(t) for t in LogLocator(subs=subs, numticks=count).tick_values(low, high) if low <= t <= high]
    places = [float(_position(tick, low, high)) for tick in ticks]
    return tuple(Tick(100 - place if flip else place, number(tick)) for place, tick in zip(places, ticks, strict=True))


def _sorted_curve(values: Floats, low: float, high: float) -> str:
    ordered = np.sort(values)[::-1]
    picked = np.unique(np.linspace(0, ordered.size - 1, min(ordered.size, MAX_COLUMNS)).round().astype(np.int64))
    if picked.size == 1:
        picked = np.zeros(2, dtype=np.int64)
    across = np.linspace(0, 100, picked.size)
    return _points(zip(across, 100 - _position(ordered[picked], low, high), strict=True))


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _middle(index: int, count: int) -> float:
    return 100 * (index + 0.5) / count


def _heat_map(role: str, rows: Sequence[RangeRow]) -> HeatMap:
    maxima = [_array(row.maxima) for row in rows]
    low, high = _log_range(maxima, _RANGE_DECADES)
    columns = min(MAX_COLUMNS, *(values.size for values in maxima))
    # The largest channel of a bin, not the mean: outliers are what the map is for.
    grid = np.stack([[part.max() for part in np.array_split(values, columns)] for values in maxima])
    labels, pattern = _short_names([row.module for row in rows])
    sizes = sorted({values.size for values in maxima})
    row_height = float(min(22, max(6, 360 / len(rows))))
    return HeatMap(
        role,
        pattern,
        tuple(
            HeatMapRow(_middle(index, len(rows)), label, _peak(row), _describe_range(row))
            for index, (row, label) in enumerate(zip(rows, labels, strict=True))
        ),
        row_height,
        math.ceil(14 / row_height),
        " or ".join(str(size) for size in sizes),
        _png(_position(grid, low, high)),
        _png(np.linspace(0, 100, MAX_COLUMNS)[None]),
        _log_ticks(low, high, 5, flip=False),
    )


def _png(percent: Floats) -> str:
    """A (rows, columns) array of 0..100 as a data URI, one pixel a value."""
    buffer = io.BytesIO()
    imsave(
        buffer, percent, vmin=0, vmax=100, cmap=_COLOURS, origin="upper", format="png", metadata={"Software": "mq-ao"}
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def peak_over_median(row: RangeRow) -> float:
    """Largest channel maximum over the median one: how far the worst channel stands out."""
    values = _array(row.maxima)
    median = float(np.median(values))
    return float(values.max()) / median if median > 0 else math.nan


def _peak(row: RangeRow) -> str:
    value = peak_over_median(row)
    return "-" if math.isnan(value) else f"{number(value)}x"


def _describe_range(row: RangeRow) -> str:
    middle = "" if row.p999 is None else f", 99.9 % of magnitudes up to {number(row.p999)}"
    return f"{row.module}: {number(row.low)} to {number(row.high)}{middle}; largest channel over median {_peak(row)}"


def _describe_node(node: NodeQuality) -> str:
    return f"{node.node} ({node.module or 'no module'}), {node.role}: {node.sqnr:.1f} dB"


def _short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """The parts in which dotted names differ, and the pattern of the rest, such as layers.*.mixer."""
    paths = [name.split(".") for name in names]
    if len({len(path) for path in paths}) > 1:
        return list(names), "*"
    differ = [len(set(parts)) > 1 for parts in zip(*paths, strict=True)]
    if not any(differ):
        return list(names), names[0]
    labels = [".".join(part for part, differs in zip(path, differ, strict=True) if differs) for path in paths]
    return labels, ".".join("*" if differs else part for part, differs in zip(paths[0], differ, strict=True))


def _layer(module: str) -> str | None:
    """The module's name up to its first number, as in layers.3; None without one."""
    parts = module.split(".")
    return next((".".join(parts[: index + 1]) for index, part in enumerate(parts) if part.isdigit()), None)


def _layer_ticks(nodes: Sequence[NodeQuality]) -> tuple[Tick, ...]:
    """The number of a layer where its nodes begin, at most eight of them."""
    starts: dict[str, int] = {}
    for index, node in enumerate(nodes):
        layer = _layer(node.module)
        if layer is not None:
            starts.setdefault(layer, index)
    step = math.ceil(len(starts) / 8) or 1
    kept = list(starts.items())[::step]
    return tuple(Tick(100 * index / len(nodes), layer.rpartition(".")[2]) for layer, index in kept)
