"""What the scripts for the paper's tables share: figures that are kept as they are measured, and printed as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from mq_ao.cli.console import err
from mq_ao.files import write_atomically

FLOAT = "float32"
"""Stands where a recipe does, for the model as it is."""

RECIPES = "rtn-w8a8,smoothquant-w8a8,quarot-w8a8,mambaquant-w8a8,rtn-w4a8,quarot-w4a8,mambaquant-w4a8"

Row = dict[str, float]


class Figures:
    """Figures in a file, which is written after each.

    Args:
        folder: where the file is, or will be.
        conditions: what else than model and recipe they depend on; figures of others in the file are left alone.
    """

    def __init__(self, folder: Path, conditions: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._conditions = folder / "figures.json", conditions
        self._known: dict[str, Row] = json.loads(self._path.read_text("utf-8")) if self._path.is_file() else {}

    def row(self, model: str, recipe: str, measure: Callable[[], Row]) -> Row:
        """The figures of a model under a recipe, measured where they are not known yet."""
        key = f"{model} {recipe} {self._conditions}"
        if key not in self._known:
            err().print(f"{model}: {recipe}", markup=False)
            self._known[key] = measure()
            write_atomically(self._path, json.dumps(self._known, indent=2).encode())
        return self._known[key]


def table(rows: Mapping[tuple[str, str], Row], columns: Sequence[str]) -> Table:
    """A row a model and recipe."""
    made = Table()
    for name in ("model", "recipe", *columns):
        made.add_column(name, justify="left" if name in ("model", "recipe") else "right")
    for (model, recipe), row in rows.items():
        made.add_row(model, recipe, *(f"{row.get(name, float('nan')):.1f}" for name in columns))
    return made
