"""`mq-ao quantize --budget`: the search, and what it found as a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mq_ao.cli import measuring
from mq_ao.cli.console import err, out
from mq_ao.errors import MqAoError
from mq_ao.files import check_output

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from mq_ao.budget import Candidate, Found
    from mq_ao.quantized import QuantizedModel
    from mq_ao.recipes import Recipe
    from mq_ao.text import TokenText

_SHOWN = 12
"""Points of the front in the table."""


def check_options(budget: str | None, native: bool, plot: Path | None, resume: Path | None) -> None:
    """Checks before long work what is said of a search.

    Raises:
        MqAoError: it is no budget, or its options do not go together.
    """
    if budget is None:
        given = next((name for name, value in (("--plot", plot), ("--resume", resume)) if value is not None), None)
        if given is not None:
            raise MqAoError(f"{given} is of a search: give a limit too, such as --budget 'size<=0.20'.")
        return
    from mq_ao.budget.parsing import parse_budget

    parse_budget(budget)
    if not native:
        raise MqAoError(
            "--budget counts the bytes of native programs: search with an output that ends in .ptn and --save-recipe "
            "FILE, and give that file as --recipe for another backend."
        )
    if plot is not None:
        from mq_ao.plots import check_plot

        check_plot(check_output(plot))
    if resume is not None:
        from mq_ao.measuring.engine import check_folder

        check_folder(resume)


def search(
    model: nn.Module,
    text: TokenText,
    tokens: int,
    budget: str,
    recipe: Recipe,
    tokenizer: str | None,
    *,
    plot: Path | None,
    resume: Path | None,
) -> QuantizedModel:
    """Quantizes by what a search on two halves of one text finds, and prints that.

    Args:
        model: float model.
        text: of which every other window is calibrated on, and the rest measured on.
        tokens: of each half.
        budget: see `parse_budget`.
        recipe: where the search starts.
        tokenizer: for programs to keep.
        plot: file to draw.
        resume: see `search_budget`.
    """
    import torch

    from mq_ao import tokenizer as tokenizers
    from mq_ao.budget import search_budget
    from mq_ao.text import calibration_batches

    windows = torch.cat(calibration_batches(text, 2 * tokens))
    calibration, validation = (list(windows[first::2].split(4)) for first in (0, 1))
    found = search_budget(model, calibration, validation, budget, recipe, resume=resume, progress=True)
    if plot is not None:
        from mq_ao.budget.plot import save_plot

        save_plot(found, plot)
    console = out()
    console.print(_table(found))
    console.print(
        "size: bytes of the native program's weights, scales included, as a share of the float32 model's. KL: mean "
        "over tokens of KL(float || quantized), nats; predicted: the sum of what each linear causes by itself. cost: "
        f"against float32. Measured on {sum(map(len, validation))} windows of the calibration text that were not "
        "calibrated on; the choice was made by them.",
        markup=False,
    )
    err().print(f"chosen: {_described(found)}", markup=False, highlight=False, soft_wrap=True)
    return found.quantized if tokenizer is None else found.quantized.keeping(tokenizers.files(tokenizer))


def _table(found: Found) -> Table:
    """Uniform precisions, then the front, with the chosen one in its place, by size."""
    from rich.table import Table

    table = Table(title=f"{found.recipe.name}", title_justify="left")
    for name in ("precision", "size", "KL predicted", "KL measured [95 %]", "cost, % [95 %]"):
        table.add_column(name, justify="left" if name == "precision" else "right")
    for name, one in sorted(found.uniform.items(), key=lambda item: item[1].size):
        table.add_row(*_row(name, one))
    table.add_section()
    end = max(one.size for one in (*found.uniform.values(), found.chosen))
    front = [one for one in found.front if one.size <= end]
    shown = {round(index * (len(front) - 1) / (_SHOWN - 1)) for index in range(_SHOWN)}
    rows = [("best for its size", front[index]) for index in sorted(shown)]
    rows.append((f"chosen for {found.budget}", found.chosen))
    for name, one in sorted(rows, key=lambda item: item[1].size):
        table.add_row(*_row(name, one), style="bold" if one is found.chosen else None)
    return table


def _row(name: str, one: Candidate) -> tuple[str, ...]:
    from mq_ao.measuring import loss

    predicted = f"{one.size:.4f}", f"{one.predicted:.5f}"
    if one.measured is None:
        return (name, *predicted, "", "")
    measured = loss([one.measured])
    return (name, *predicted, measuring.nats(measured.divergence), measuring.percent(measured.cost))


def _described(found: Found) -> str:
    """How many linears of each role have which weights."""
    counts: dict[str, Counter[str]] = {}
    for site, choice in found.chosen.choices.items():
        words = "float" if choice is None else f"{choice.weight}, {choice.activation}"
        counts.setdefault(str(site.role), Counter())[words] += 1
    return "; ".join(
        f"{role} {', '.join(f'{count} x {words}' for words, count in found.most_common())}"
        for role, found in counts.items()
    )
