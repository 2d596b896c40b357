"""From plain data to one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mq_ao.extras import needs
from mq_ao.files import check_output, write_atomically
from mq_ao.passes import Status, Transform
from mq_ao.quantizer.report import Decision
from mq_ao.report import plots
from mq_ao.report.data import NodeQuality, PageData, RangeRow, Size
from mq_ao.report.plots import number

with needs("the page of a report", extra="report"):
    from jinja2 import Environment, PackageLoader, StrictUndefined

_WORST = 15  # nodes in the table that is open from the start
_FEATURED = 6  # variance plots shown at once; the others are folded away


class Cell(NamedTuple):
    """A table cell; those with a value are numbers, aligned right and sorted by it."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Fact:
    """One headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Things that met the same fate: `members` is what they are called, each with its own detail where they differ."""

    name: str
    status: str
    detail: str
    members: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SizeBar:
    """One part's weights, with the widths of its bars in percent."""

    part: str
    before: str
    after: str
    saving: str
    before_width: float
    after_width: float


def render(data: PageData) -> str:
    """Returns the page: one HTML document without references to anything outside it, the same for the same data."""
    environment = Environment(
        loader=PackageLoader("mq_ao.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    featured = _featured(data)
    variance_plots = plots.variance_plots(data.variances) if data.variances else []
    worst = sorted(data.nodes, key=_badness)
    return environment.get_template("template.html").render(
        data=data,
        facts=_facts(data, worst),
        transforms=_transform_groups(data.transforms),
        featured=[plot for index, plot in enumerate(variance_plots) if index in featured],
        folded=[plot for index, plot in enumerate(variance_plots) if index not in featured],
        heat_maps=plots.heat_maps(data.ranges),
        ranges=[_range_cells(row) for row in data.ranges],
        quality=plots.quality_plot(data.nodes),
        worst=[_node_cells(node) for node in worst[:_WORST]],
        nodes=[_node_cells(node) for node in data.nodes] if len(data.nodes) > _WORST else [],
        unplotted=sum(not math.isfinite(node.sqnr) for node in data.nodes),
        quantized=_decision_groups([item for item in data.decisions if item.accepted]),
        left_out=_decision_groups([item for item in data.decisions if not item.accepted]),
        decisions=[_decision_cells(item) for item in data.decisions],
        sizes=_size_bars(data.sizes),
    )


def write(data: PageData, path: str | Path) -> None:
    """Writes the page to `path`, whole or not at all.

    Raises:
        MqAoError: `path` does not end in .html or cannot be written.
    """
    write_atomically(check_output(path, ".html"), render(data).encode("utf-8"))


def _facts(data: PageData, worst: Sequence[NodeQuality]) -> list[Fact]:
    tokens = f", tokens: {data.tokens:,}" if data.tokens else ""
    facts = [Fact("recipe", data.recipe, f"calibration batches: {data.batches:,}{tokens}")]
    if data.decisions:
        accepted = sum(decision.accepted for decision in data.decisions)
        left = len(data.decisions) - accepted
        facts.append(Fact("nodes quantized", f"{accepted} of {len(data.decisions)}", f"{left} left in float"))
    if data.transforms:
        applied = sum(transform.status is Status.APPLIED for transform in data.transforms)
        left = len(data.transforms) - applied
        facts.append(Fact("rewrites applied", f"{applied} of {len(data.transforms)}", f"{left} left out"))
    if data.sizes:
        total = _total(data.sizes)
        facts.append(Fact("weights", _bytes(total.quantized_bytes), f"{_bytes(total.float_bytes)} in float"))
    if worst:
        facts.append(
            Fact("worst node", _decibels(worst[0].sqnr), f"{worst[0].role}, {worst[0].module or worst[0].node}")
        )
    return facts


def _featured(data: PageData) -> set[int]:
    """Indices of the first profile and of those that are most uneven before the rotation."""
    ratios = [plots.ratio(profile.before) for profile in data.variances]
    # Where all channels are dead there is no ratio and nothing to see: those come last.
    ranks = [-1.0 if math.isnan(value) else value for value in ratios]
    uneven = sorted(range(1, len(ranks)), key=ranks.__getitem__, reverse=True)
    return {0, *uneven[: _FEATURED - 1]}


def _transform_groups(transforms: Sequence[Transform]) -> list[Group]:
    """Those applied, together by rewrite; those left out, by rewrite and reason, so that every reason is seen."""
    found: dict[tuple[str, str, str, str], list[Transform]] = {}
    for item in transforms:
        reason = item.detail if item.status is Status.LEFT_OUT else ""
        found.setdefault((item.name, item.step, item.status, reason), []).append(item)
    return [_transform_group(items) for items in found.values()]


def _transform_group(items: Sequence[Transform]) -> Group:
    first = items[0]
    same = all(item.detail == first.detail for item in items)
    return Group(
        f"{first.name} ({first.step})" if first.step else first.name,
        first.status,
        first.detail if same else "",
        tuple((item.where, "" if same else item.detail) for item in items),
    )


def _decision_groups(decisions: Sequence[Decision]) -> list[Group]:
    found: dict[tuple[str, str], list[Decision]] = {}
    for item in decisions:
        found.setdefault((item.role or "no role", item.detail), []).append(item)
    return [
        Group(
            role,
            "",
            detail,
            tuple((f"{item.node} ({item.module})" if item.module else item.node, "") for item in items),
        )
        for (role, detail), items in found.items()
    ]


def _badness(node: NodeQuality) -> float:
    return -math.inf if math.isnan(node.sqnr) else node.sqnr


def _node_cells(node: NodeQuality) -> tuple[Cell, ...]:
    sqnr = Cell(_decibels(node.sqnr), _badness(node))
    shape = Cell(node.shape.replace(" ", "\N{NO-BREAK SPACE}"))
    return Cell(node.node), sqnr, Cell(node.role), Cell(node.module), shape


def _range_cells(row: RangeRow) -> tuple[Cell, ...]:
    p999 = Cell("-", -1.0) if row.p999 is None else Cell(number(row.p999), row.p999)
    peak = plots.peak_over_median(row)
    return (
        Cell(row.role),
        Cell(row.module),
        Cell(number(row.low), row.low),
        Cell(number(row.high), row.high),
        p999,
        Cell(str(int(row.maxima.argmax())), float(row.maxima.argmax())),
        Cell("-", -1.0) if math.isnan(peak) else Cell(f"{number(peak)}x", peak),
    )


def _decision_cells(item: Decision) -> tuple[Cell, ...]:
    status = "quantized" if item.accepted else "left in float"
    return Cell(item.node), Cell(item.module), Cell(item.role or "-"), Cell(status), Cell(item.detail)


def _size_bars(sizes: Sequence[Size]) -> list[SizeBar]:
    """One bar a part, and the total where there are several parts; widths are shares of the larger total."""
    total = _total(sizes)
    whole = max(total.float_bytes, total.quantized_bytes) or 1
    return [_size_bar(size, whole) for size in ([*sizes, total] if len(sizes) > 1 else sizes)]


def _size_bar(size: Size, whole: int) -> SizeBar:
    return SizeBar(
        size.part,
        _bytes(size.float_bytes),
        _bytes(size.quantized_bytes),
        f"{size.float_bytes / size.quantized_bytes:.2f}x" if size.quantized_bytes else "-",
        100 * size.float_bytes / whole,
        100 * size.quantized_bytes / whole,
    )


def _total(sizes: Sequence[Size]) -> Size:
    return Size("total", sum(size.float_bytes for size in sizes), sum(size.quantized_bytes for size in sizes))


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else number(value)
