"""`mq-ao bench quantize`: what quantizing itself takes."""

from __future__ import annotations

from typing import Annotated

import typer

from mq_ao.cli.benching import (
    Json,
    Models,
    Recipes,
    Threads,
    chosen_models,
    chosen_recipes,
    chosen_threads,
    machine,
    show,
    write,
)
from mq_ao.cli.console import check_json, ready_kernels, step


def quantize(
    *,
    model: Models = None,
    recipe: Recipes = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 16384,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure time and memory of quantizing itself, in a process for every model and recipe.

    [bold]Examples[/bold]

    mq-ao bench quantize --model mamba-130m --recipe mambaquant-w8a8

    mq-ao bench quantize --model demo --calibration-tokens 4096 --json quantizing.json
    """
    check_json(json)
    with step("starting"):
        from mq_ao.bench.quantizing import measure_quantizing
        from mq_ao.bench.table import render_quantizing
    threads = chosen_threads(threads)
    names = chosen_recipes(recipe)
    ready_kernels()
    costs = []
    for source in chosen_models(model):
        for name in names:
            with step(f"quantizing {source} ({name})"):
                costs.append(measure_quantizing(source, name, calibration_tokens, threads))
    write({"machine": machine(threads), "quantizing": [cost.to_dict() for cost in costs]}, json)
    if json != "-":
        show(render_quantizing(costs))
