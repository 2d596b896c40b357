"""Files of plots: what they may be called, and writing them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mq_ao.errors import MqAoError
from mq_ao.extras import needs
from mq_ao.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Checks before long work that a plot of that name can be drawn.

    Raises:
        MqAoError: no PNG or SVG, or matplotlib is not installed.
    """
    if path.suffix not in _SUFFIXES:
        raise MqAoError(f"{path} must end in {' or '.join(_SUFFIXES)}.")
    with needs("a plot", extra="report"):
        import_module("matplotlib")


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure as PNG or SVG, by the suffix, under a temporary name that is renamed when it is complete.

    Raises:
        MqAoError: the path cannot be written.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=dpi)
