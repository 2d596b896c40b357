"""`mq-ao ablate`: what each transform is worth, on one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.cli import measuring
from mq_ao.cli.console import bar, check_json, out, step, write_json
from mq_ao.cli.opened import MODEL_HELP, TOKENIZER_HELP, CalibrationFile
from mq_ao.files import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.ablation import Row
    from mq_ao.cli.measuring import Subject


def ablate(
    *,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    calibration: CalibrationFile = None,
    text: measuring.TextFile = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens, spread evenly over the file.")] = 16384,
    eval_tokens: Annotated[int, typer.Option(help="Tokens to predict, from the beginning of the text.")] = 16384,
    outliers: measuring.Outliers = None,
    bits: Annotated[str, typer.Option(help="Widths of the weights.")] = "8,4",
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    json: measuring.Json = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write, ending in .png or .svg.")] = None,
    resume: measuring.Resume = None,
) -> None:
    """Add one transform at a time, everything else fixed, and show what each is worth beside the baselines.

    Every row is measured in simulated integers, on the same text, calibrated on the same other text. Intervals hold the
    true value in 95 % of cases, for other text; they say nothing of other calibration data, as those of compare do.

    [bold]Examples[/bold]

    mq-ao ablate demo

    mq-ao ablate demo --outliers 100 --bits 8 --plot outliers.svg

    mq-ao ablate state-spaces/mamba-130m-hf --calibration train.txt --text test.txt --resume rows --json rows.json
    """
    check_json(json)
    if plot is not None:
        check_output(plot)
    with step("starting"):
        from mq_ao.ablation import ablate as run
        from mq_ao.ablation import all_steps, save_plot
        from mq_ao.ablation.steps import parse_bits
        from mq_ao.measuring.engine import check_folder
        from mq_ao.plots import check_plot
    if plot is not None:
        check_plot(plot)
    if resume is not None:
        check_folder(resume)
    chosen = [item for width in parse_bits(bits) for item in all_steps(width, outliers)]
    texts = (model, calibration, text, tokenizer)
    subject = measuring.open_subject(*texts, tokens=tokens, eval_tokens=eval_tokens)
    with bar("ablation", len(chosen)) as advance:
        rows = run(subject.metric.model, subject.draws[0], subject.metric, chosen, resume=resume, progress=advance)
    if plot is not None:
        save_plot(rows, plot)
    if json is not None:
        write_json(json, {**subject.about, "outliers": outliers, "rows": [row.to_dict() for row in rows]})
    if json != "-":
        _print(rows, subject)


def _print(rows: list[Row], subject: Subject) -> None:
    console = out()
    console.print(subject.title(rows[0].measured), markup=False, soft_wrap=True)
    for bits in dict.fromkeys(row.bits for row in rows):
        console.print(_table(bits, [row for row in rows if row.bits == bits]))
    console.print(
        "cost: against float32. KL: mean over tokens of KL(float || quantized), nats. same: tokens with float's "
        "likeliest one. alone: that transform by itself on top of static RTN. W8A8 and W4A8: bits of weights "
        "and activations; static scales, scan operands in int8 too, but for the named recipes. Intervals: "
        f"95 %, over {subject.metric.pieces.what}.",
        markup=False,
    )


def _table(bits: int, rows: list[Row]) -> Table:
    """The rows of one width of the weights."""
    from rich.table import Table

    from mq_ao.ablation import Group

    table = Table(title=f"W{bits}A8", title_justify="left")
    for name in ("step", "cost, % [95 %]", "KL [95 %]", "same", "alone: KL"):
        table.add_column(name, justify="left" if name == "step" else "right")
    alone = {row.name: row for row in rows if row.group is Group.ALONE}
    before = None
    for row in rows:
        if row.group is Group.ALONE:
            continue
        if row.group is not before:
            table.add_section()
        before = row.group
        by_itself = alone.get(row.name) if row.group is Group.CHAIN else None
        table.add_row(
            row.name,
            measuring.percent(row.loss.cost),
            measuring.nats(row.loss.divergence),
            f"{100 * row.measured.agreement:.2f} %",
            f"{by_itself.measured.mean_divergence:.5f}" if by_itself else "",
        )
    return table
