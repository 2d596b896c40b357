"""The plot of a search: divergence against size, with the uniform precisions and the chosen one."""

from __future__ import annotations

from pathlib import Path

from mq_ao.budget.parsing import Quantity
from mq_ao.budget.search import Candidate, Found
from mq_ao.plots import check_plot, write_figure

_FRONT, _UNIFORM, _CHOSEN = "#0072b2", "#56b4e9", "#d55e00"  # apart for every kind of colour vision
_ROOM = 1.3
"""How much further than the largest uniform precision the size axis reaches."""


def save_plot(found: Found, path: Path) -> None:
    """Draws the front as predicted, and what was measured, and saves them as PNG or SVG, by the suffix.

    Args:
        found: of `search_budget`.
        path: file to write.

    Raises:
        MqAoError: the suffix is neither, matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    end = _ROOM * max(found.chosen.size, *(one.size for one in found.uniform.values()))
    front = [one for one in found.front if one.size <= end]
    axes.plot(
        *([one.size for one in front], [one.predicted for one in front]),
        color=_FRONT,
        drawstyle="steps-post",
        label="best for every size, predicted",
    )
    for index, (name, one) in enumerate(sorted(found.uniform.items(), key=lambda item: item[1].size)):
        at = one.size, _measured(one)
        axes.scatter(*at, color=_UNIFORM, marker="s", edgecolor="0.3", linewidth=0.6, zorder=3)
        axes.annotate(name, at, xytext=(6, -10 if index % 2 == 0 else 4), textcoords="offset points", fontsize=8)
    at = found.chosen.size, _measured(found.chosen)
    axes.scatter(*at, color=_CHOSEN, marker="*", s=160, zorder=4, label=f"chosen for {found.budget}, measured")
    axes.scatter([], [], color=_UNIFORM, marker="s", edgecolor="0.3", linewidth=0.6, label="uniform, measured")
    if found.budget.quantity is Quantity.SIZE:
        axes.axvline(found.budget.limit, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel="size, share of the float32 weights", ylabel="mean KL to float, nats", yscale="log")
    axes.grid(visible=True, which="both", linewidth=0.3, alpha=0.5)
    axes.legend(frameon=False)
    write_figure(figure, path)


def _measured(candidate: Candidate) -> float:
    assert candidate.measured is not None, "these are measured"
    return candidate.measured.mean_divergence
