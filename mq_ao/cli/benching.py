"""What `mq-ao bench` and its commands have in common: options, the machine, and where results go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.console import out, write_json
from mq_ao.cli.opened import MODEL_HELP
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.recipes import Recipe

Models = Annotated[
    list[str] | None,
    typer.Option(
        help="mamba-130m, mamba2-130m, bamba-350m or granite-moe-420m (random weights), "
        f"{MODEL_HELP} May be repeated. Default: demo and mamba-130m."
    ),
]
Recipes = Annotated[
    list[str] | None,
    typer.Option(help="How ours is quantized: a name or a file. May be repeated. Default: rtn-w8a8."),
]
Lengths = Annotated[str, typer.Option(help="Prefill lengths, comma-separated.")]
Contexts = Annotated[str, typer.Option(help="Tokens before the ones that decode measures, comma-separated.")]
DecodeTokens = Annotated[int, typer.Option(min=1, help="Tokens a decode measurement.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; medians over them are reported.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of everything that is timed. Default: all cores.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")]

LENGTHS, CONTEXTS, DECODE_TOKENS, REPEATS = "128,1024,4096", "64", 64, 5
"""Defaults."""


def chosen_models(models: list[str] | None) -> list[str]:
    """Those that were given, or the default."""
    return models or ["demo", "mamba-130m"]


def chosen_recipes(names: list[str] | None) -> dict[str, Recipe]:
    """Those that were given, or the default, by what they were called.

    Raises:
        MqAoError: one is unknown, or two have one name.
    """
    from mq_ao.bench.prepare import int8_names
    from mq_ao.recipes import get_recipe

    names = names or ["rtn-w8a8"]
    recipes = [get_recipe(name) for name in names]
    int8_names(recipes)
    return dict(zip(names, recipes, strict=True))


def parse_lengths(text: str, option: str = "--tokens") -> tuple[int, ...]:
    """The value of `--tokens`, or of another option of this kind, in order.

    Raises:
        MqAoError: no numbers, or one below 1.
    """
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise MqAoError(f"{option} is {text!r}: give whole numbers, comma-separated, such as 128,1024.") from None
    if min(lengths) < 1:
        raise MqAoError(f"{option} is {text!r}: a prefill has at least one token.")
    return tuple(sorted(set(lengths)))


def chosen_threads(threads: int | None) -> int:
    """How many were asked for, or all; PyTorch uses as many from now on."""
    import torch

    threads = threads or _cores()
    torch.set_num_threads(threads)
    return threads


def machine(threads: int) -> dict[str, Any]:
    """What figures depend on: processor, threads, versions."""
    import platform

    import torch

    from mq_ao import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "threads": threads, "torch": torch.__version__, "mq_ao": __version__}


def write(content: dict[str, Any], json: str | None) -> None:
    """Writes figures to where `--json` says, if it says so."""
    if json is not None:
        write_json(json, content)


def show(parts: Sequence[Table | str]) -> None:
    """Prints results."""
    console = out()
    for part in parts:
        console.print(part)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
