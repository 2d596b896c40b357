"""`mq-ao compare`: recipes against the float model and against each other, with intervals."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.cli import measuring
from mq_ao.cli.console import bar, check_json, out, step, write_json
from mq_ao.cli.opened import MODEL_HELP, TOKENIZER_HELP, CalibrationFile
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.cli.measuring import Subject
    from mq_ao.measuring import RecipeComparison, TextMetric
    from mq_ao.recipes import Recipe


def compare(
    *,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    recipe: Annotated[list[str], typer.Option(help="Name of a recipe, or a recipe file; give it several times.")],
    text: measuring.TextFile = None,
    calibration: CalibrationFile = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens to predict, from the beginning of the text; all by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens of a draw, spread evenly over the file.")] = 16384,
    draws: Annotated[
        int, typer.Option(help="Sets of calibration data, none of which shares a token with another.")
    ] = 3,
    outliers: measuring.Outliers = None,
    lowered: Annotated[
        bool, typer.Option("--lowered", help="Run programs in real integers; by default these are simulated.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    json: measuring.Json = None,
    resume: measuring.Resume = None,
) -> None:
    """Set recipes against the float model and against each other, on one text, calibrated several times.

    Differences are taken token by token. Intervals hold the true value in 95 % of cases: they come from resampling
    pieces of the text, documents or blocks of them, and draws of calibration data.

    [bold]Examples[/bold]

    mq-ao compare demo --recipe quarot-w4a8 --recipe mambaquant-w4a8

    mq-ao compare demo --recipe mambaquant-w8a8 --recipe mine.yaml --draws 4 --resume runs --json mine.json

    mq-ao compare state-spaces/mamba-130m-hf --recipe mambaquant-w4a8 --calibration train.txt --text test.txt
    """
    check_json(json)
    with step("starting"):
        from mq_ao.measuring import compare_recipes
        from mq_ao.measuring.engine import check_folder
    if resume is not None:
        check_folder(resume)
    chosen = _recipes(recipe, outliers)
    texts = (model, calibration, text, tokenizer)
    subject = measuring.open_subject(*texts, tokens=tokens, eval_tokens=eval_tokens, draws=draws, lowered=lowered)
    with bar("comparing", len(chosen) * draws) as advance:
        found = compare_recipes(subject.metric, chosen, subject.draws, resume=resume, progress=advance)
    if json is not None:
        write_json(json, {**subject.about, "outliers": outliers, "lowered": lowered, **found.to_dict()})
    if json != "-":
        _print(found, subject)


def _recipes(names: list[str], outliers: float | None) -> dict[str, Recipe]:
    from mq_ao.measuring.comparison import with_outliers
    from mq_ao.recipes import get_recipe

    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MqAoError(f"--recipe {twice} is given twice: give every recipe once.")
    return {name: with_outliers(get_recipe(name), outliers) for name in names}


def _print(found: RecipeComparison, subject: Subject) -> None:
    metric, console = subject.metric, out()
    first = next(iter(found.draws.values()))[0]
    console.print(subject.title(first), markup=False, soft_wrap=True)
    console.print(_losses(found, metric, sum(first.reference)))
    if len(found.draws) > 1:
        console.print(_pairs(found))
    draws = len(subject.draws)
    console.print(
        "cost: against float32. KL: mean over tokens of KL(float || quantized). same: tokens with float's likeliest "
        "one. best: the least, or the 95 % interval of its paired difference to the least holds 0. Resampled: "
        f"{metric.pieces.what}, "
        + (f"and {draws} draws of calibration data." if draws > 1 else "and no calibration data: there is one draw."),
        markup=False,
    )


def _losses(found: RecipeComparison, metric: TextMetric, reference: float) -> Table:
    """Every recipe against the float model, whose cost of the text is `reference` nats."""
    from rich.table import Table

    table = Table()
    for name in ("recipe", metric.unit, "cost, % [95 %]", "KL, nats [95 %]", "same", "best"):
        table.add_column(name, justify="left" if name in ("recipe", "best") else "right")
    table.add_row("float32", f"{metric.level(reference):.4f}")
    for name, loss in found.losses.items():
        among = {"cost": found.among_best_cost(name), "KL": found.among_best_divergence(name)}
        table.add_row(
            name,
            f"{metric.level(reference * (1 + loss.cost.value)):.4f}",
            measuring.percent(loss.cost),
            measuring.nats(loss.divergence),
            f"{100 * found.agreement(name):.2f} %",
            ", ".join(what for what, yes in among.items() if yes),
        )
    return table


def _pairs(found: RecipeComparison) -> Table:
    """Recipes against each other."""
    from rich.table import Table

    table = Table()
    for name in ("recipe", "against", "cost, % [95 %]", "KL, nats [95 %]"):
        table.add_column(name, justify="left" if name in ("recipe", "against") else "right")
    for one, other in itertools.combinations(found.draws, 2):
        loss = found.differences[one, other]
        table.add_row(one, other, measuring.percent(loss.cost), measuring.nats(loss.divergence, "+"))
    return table
