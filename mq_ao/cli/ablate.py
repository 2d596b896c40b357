"""`mq-ao ablate`: what each transform is worth, on one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.cli.console import bar, check_json, out, step, write_json
from mq_ao.cli.opened import MODEL_HELP, TOKENIZER_HELP, Opened, open_float
from mq_ao.files import check_output

if TYPE_CHECKING:
    from mq_ao.ablation import Row
    from mq_ao.text import TokenText


def ablate(
    *,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="Text, or token ids (.npy, .safetensors). Default for demo: the bundled text.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="What is predicted, likewise; not the calibration text. Default for demo: the bundled text.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens, spread evenly over the file.")] = 16384,
    eval_tokens: Annotated[int, typer.Option(help="Tokens to predict, from the beginning of the text.")] = 16384,
    outliers: Annotated[
        float | None, typer.Option(help="Plant outliers of this factor first; the float model stays the same.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Widths of the weights.")] = "8,4",
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write, ending in .png or .svg.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Keeps finished rows; a run that was cut off goes on from there.")
    ] = None,
) -> None:
    """Add one transform at a time, everything else fixed, and show what each is worth beside the baselines.

    Every row is measured in simulated integers, on the same text, calibrated on the same other text.

    [bold]Examples[/bold]

    mq-ao ablate demo

    mq-ao ablate demo --outliers 100 --bits 8 --plot outliers.svg

    mq-ao ablate state-spaces/mamba-130m-hf --calibration train.txt --text test.txt --resume rows.jsonl --json rows.json
    """
    check_json(json)
    for path in (plot, resume):
        if path is not None:
            check_output(path)
    with step("starting"):
        from mq_ao.ablation import TextMetric, all_steps, save_plot
        from mq_ao.ablation import ablate as run
        from mq_ao.ablation.plot import check_plot
        from mq_ao.ablation.run import check_disjoint, first_tokens, read_finished
        from mq_ao.ablation.steps import parse_bits
        from mq_ao.text import calibration_batches
    if plot is not None:
        check_plot(plot)
    if resume is not None:
        read_finished(resume)
    chosen = [item for width in parse_bits(bits) for item in all_steps(width, outliers)]
    files = _files(model, calibration, text)
    loaded = open_float(model)
    opened = Opened(model, loaded, loaded.config.vocab_size, tokenizer)
    batches = calibration_batches(_read(files[0], opened), tokens)
    predicted = first_tokens(_read(files[1], opened), eval_tokens)
    check_disjoint(batches, predicted)
    metric = TextMetric(loaded, predicted)
    with bar("ablation", len(chosen)) as advance:
        rows = run(loaded, batches, metric, chosen, resume=resume, progress=advance)
    if plot is not None:
        save_plot(rows, metric.name, plot)
    if json is not None:
        data = {"model": model, "calibration": str(files[0]), "text": str(files[1]), "outliers": outliers}
        counts = {"calibration_tokens": sum(batch.numel() for batch in batches), "tokens": predicted.predicted}
        write_json(json, {**data, **counts, "metric": metric.name, "rows": [row.to_dict() for row in rows]})
    if json != "-":
        reference = f"{metric.name} {rows[0].measured.reference:.4f} in float32"
        _print(rows, f"{model} on {predicted.predicted} tokens of {files[1]}, {reference}")


def _files(model: str, calibration: Path | None, text: Path | None) -> tuple[Path, Path]:
    """Calibration and evaluation file."""
    from mq_ao.errors import MqAoError
    from mq_ao.models import demo

    if model == "demo":
        calibration, text = calibration or demo.CALIBRATION, text or demo.HELDOUT
    if calibration is None or text is None:
        raise MqAoError("an ablation needs two texts or files of token ids: give --calibration FILE and --text FILE.")
    if calibration.samefile(text):
        raise MqAoError(f"{text} is to calibrate and to evaluate on: give two files with different text.")
    return calibration, text


def _read(path: Path, opened: Opened) -> TokenText:
    from mq_ao.text import TOKEN_FILES, read_tokens

    return read_tokens(path, opened.vocab_size, None if path.suffix in TOKEN_FILES else opened.codec)


def _print(rows: list[Row], title: str) -> None:
    from rich.table import Table

    from mq_ao.ablation import Group

    widths = list(dict.fromkeys(row.bits for row in rows))
    measured = {(row.group, row.name, row.bits): row.measured for row in rows}
    table = Table()
    table.add_column("step")
    for width in widths:
        for name in ("cost", "KL", "same", "alone: KL"):
            table.add_column(f"W{width}A8\n{name}", justify="right")
    before = None
    for group, name in dict.fromkeys((row.group, row.name) for row in rows if row.group is not Group.ALONE):
        if group is not before:
            table.add_section()
        before, cells = group, []
        for width in widths:
            ours = measured[group, name, width]
            alone = measured.get((Group.ALONE, name, width)) if group is Group.CHAIN else None
            cells += [f"{100 * ours.change:+.3f} %", f"{ours.divergence:.5f}", f"{100 * ours.agreement:.2f} %"]
            cells.append(f"{alone.divergence:.5f}" if alone else "")
        table.add_row(name, *cells)
    console = out()
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        "cost: against float32. KL: mean over tokens of KL(float || quantized), nats. same: tokens with float's "
        "likeliest one. alone: KL of that transform by itself on top of static RTN. W8A8 and W4A8: bits of weights "
        "and activations; static scales, scan operands and gate in int8 too, but for the named recipes.",
        markup=False,
    )
