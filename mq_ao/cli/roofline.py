"""`mq-ao roofline`: predicted times on GPUs that are not at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.console import bar, check_json, out, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.roofline import Device, Prediction

DEFAULT_RECIPES = ("mambaquant-w8a8", "mambaquant-w4a8", "mambaquant-w4a16")
EVERY = "all"
FLOAT = "fp16"
PHASES = ("prefill", "decode")
_MODEL_HELP = (
    '"demo", 130m, 370m, 790m, 1.4b, 2.8b, mamba2-130m, mamba2-2.7b, mamba2-8b, or a folder with a config.json.'
)


def roofline(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    device: Annotated[str, typer.Option(help="h100, h200, a100, a5000 or orin.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Recipe by name or file; repeat for several, or {EVERY}. Default: {', '.join(DEFAULT_RECIPES)}."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    json: Annotated[str | None, typer.Option(help="Write the result as JSON, - for stdout.")] = None,
) -> None:
    """Predict prefill and decode on a GPU, in fp16 and quantized, from bytes and operations of the lowered graphs.

    Nothing is run on a GPU, and none is needed. A kernel takes as long as its bytes at the memory's bandwidth or its
    operations at the unit's throughput, whichever is longer, and a launch; of each, a fixed part of the peak is taken
    to be reached. Decode is one step of a CUDA graph; prefill gives the last token's logits.

    [bold]Examples[/bold]

    mq-ao roofline 2.8b --device a5000

    mq-ao roofline mamba2-8b --device h100 --recipe rtn-w8a8 --recipe mambaquant-w4a8 --tokens 2048

    mq-ao roofline 130m --device orin --recipe all --batch 8 --json prediction.json
    """
    from mq_ao.recipes import RECIPES, get_recipe
    from mq_ao.roofline import at_run_time, count_model, get_device, get_shape, predict

    check_json(json)
    gpu, config = get_device(device), get_shape(model)
    names = tuple(recipe or DEFAULT_RECIPES)
    names = tuple(RECIPES) if EVERY in names else names
    chosen = {FLOAT: None, **{name: at_run_time(get_recipe(name)) for name in names}}
    found: dict[str, dict[str, Prediction]] = {}
    with bar("counting", len(chosen)) as advance:
        for name, item in chosen.items():
            advance(0, f"counting {name}")
            same = next((other for other in found if chosen[other] == item), None)
            if same is None:
                counted = count_model(config, item, batch, tokens, gpu)
                found[name] = {phase: predict(getattr(counted, phase), gpu) for phase in PHASES}
            else:
                found[name] = found[same]
            advance()
    if json is not None:
        write_json(json, _record(model, gpu, tokens, batch, found))
    if json != "-":
        _show(model, gpu, tokens, batch, found)


def _record(
    model: str, device: Device, tokens: int, batch: int, found: dict[str, dict[str, Prediction]]
) -> dict[str, Any]:
    predictions = {
        name: {phase: {**item.to_dict(), "speedup": _speedup(found, name, phase)} for phase, item in phases.items()}
        for name, phases in found.items()
    }
    head = {"predicted": True, "model": model, "device": asdict(device), "tokens": tokens, "batch": batch}
    return {**head, "predictions": predictions}


def _speedup(found: dict[str, dict[str, Prediction]], name: str, phase: str) -> float:
    return found[FLOAT][phase].seconds / found[name][phase].seconds


def _show(model: str, device: Device, tokens: int, batch: int, found: dict[str, dict[str, Prediction]]) -> None:
    console = out()
    lengths = {"prefill": f"prefill of {batch} x {tokens} tokens", "decode": f"one decode step of {batch} x 1 token"}
    for name, phases in found.items():
        for phase, prediction in phases.items():
            console.print(_table(f"PREDICTED, not measured: {model} {name}, {lengths[phase]}", prediction))
    console.print(_summary(f"PREDICTED, not measured: {model} on {device.title}", found))
    console.print(_assumptions(device), soft_wrap=True, highlight=False)


def _table(title: str, prediction: Prediction) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("role", "operator", "bound by"):
        table.add_column(column)
    for column in ("kernels", "MB", "GOP fp16", "GOP int8", "GOP fp32", "G special", "us"):
        table.add_column(column, justify="right")
    for line in prediction.lines:
        table.add_row(line.role, line.operator.rpartition(".")[2], line.bound, *_figures(line))
    table.add_section()
    table.add_row("total", "", "", *_figures(prediction))
    return table


def _figures(item: Any) -> tuple[str, ...]:
    cost = item.cost
    units = (cost.moved / 1e6, *(count / 1e9 for count in (cost.fp16, cost.int8, cost.fp32, cost.special)))
    return (
        str(cost.kernels),
        *(f"{value:.3f}" if value < 1 else f"{value:.1f}" for value in units),
        (f"{item.seconds * 1e6:.1f}"),
    )


def _summary(title: str, found: dict[str, dict[str, Prediction]]) -> Table:
    from rich.table import Table

    table = Table("recipe", title=title, title_justify="left")
    for phase in PHASES:
        table.add_column(f"{phase} ms", justify="right")
        table.add_column("speed-up", justify="right")
    for name, phases in found.items():
        cells = ((f"{phases[phase].seconds * 1e3:.2f}", f"{_speedup(found, name, phase):.2f}x") for phase in PHASES)
        table.add_row(name, *(cell for pair in cells for cell in pair))
    return table


def _assumptions(device: Device) -> str:
    return (
        f"PREDICTED as max(bytes / bandwidth, operations / throughput) + {device.launch * 1e6:.1f} us a kernel, of "
        f"{device.memory_fraction:.0%} of {device.bandwidth / 1e9:.0f} GB/s, {device.fp16_fraction:.0%} of "
        f"{device.fp16 / 1e12:.1f} fp16 and {device.int8_fraction:.0%} of {device.int8 / 1e12:.1f} int8 TOP/s (dense), "
        f"{device.fp32_fraction:.0%} of {device.fp32 / 1e12:.1f} fp32 and {device.special / 1e12:.2f} special TOP/s."
    )
