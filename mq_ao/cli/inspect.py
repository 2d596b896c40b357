"""`mq-ao inspect`: what is recognised in a model, or what a saved program consists of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.backends import EXECUTORCH, NATIVE, backend_of
from mq_ao.cli.console import kernel_name, megabytes, out, said, step
from mq_ao.cli.opened import ANY_HELP, is_program, open_model
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from rich.table import Table
    from torch.fx import Node

    from mq_ao.graph import Match

DEFAULT_RECIPE = "rtn-w8a8"


def inspect(
    model: Annotated[str, typer.Argument(help=ANY_HELP)],
    profile: Annotated[
        bool, typer.Option("--profile", help="Run a .pte program, and show the time of every operator.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the profiled prefill. Default: 128, or fewer if the program takes fewer."),
    ] = None,
) -> None:
    """Show a model's blocks and which part plays which role, or a saved program's recipe and kernels.

    Of a .pte program also: its delegates, what is outside of them and why, its memory, and its size by part.

    [bold]Examples[/bold]

    mq-ao inspect demo

    mq-ao inspect demo-w8a8.ptn

    mq-ao inspect demo-w8a8.pte

    mq-ao inspect demo-w8a8.pte --profile --tokens 64
    """
    portable = backend_of(model) is EXECUTORCH
    if profile and not portable:
        other = f": mq-ao bench profile {model}" if backend_of(model) is NATIVE else ""
        raise MqAoError(f"--profile is for .pte programs, and {model} is none{other}.")
    if tokens is not None and not profile:
        raise MqAoError("--tokens is the length of what --profile runs: give both.")
    if profile:
        from mq_ao.cli import profile_pte

        profile_pte.show(Path(model), tokens)
    elif portable:
        from mq_ao.cli import inspect_pte

        inspect_pte.show(Path(model))
    elif is_program(model):
        _program(Path(model))
    else:
        _model(model)


def _program(path: Path) -> None:
    from rich.table import Table

    with step(f"loading {path}"):
        from mq_ao.loading import load

        program = load(path)
    console = out()
    table = Table("property", "value", title=str(path), title_justify="left")
    rows: Mapping[str, Any] = {
        "file": megabytes(path.stat().st_size),
        "resident weights": megabytes(program.weight_bytes),
        **said(program.info),
    }
    for key, value in rows.items():
        table.add_row(key, str(value))
    console.print(table)
    if not program.integer_kernels:
        console.print("no integer kernels: a float program")
        return
    kernels = Table("integer kernel", "calls a forward pass")
    for name, count in program.integer_kernels.items():
        kernels.add_row(kernel_name(name), str(count))
    console.print(kernels)


def _model(source: str) -> None:
    model = open_model(source)
    with step("capturing"):
        import torch

        from mq_ao.api import capture
        from mq_ao.graph import match
        from mq_ao.models import MambaLM

        matched = match(capture(model, (torch.zeros(2, 8, dtype=torch.int64),)))
    console = out()
    console.print(matched.describe(), markup=False, highlight=False, soft_wrap=True)
    console.print(_roles(matched))
    total = sum(parameter.numel() for parameter in model.parameters())
    shape = model.config if isinstance(model, MambaLM) else type(model.model).__name__
    console.print(
        f"{total} parameters, {megabytes(4 * total)} in float32 ({shape})",
        markup=False,
        soft_wrap=True,
    )


def _roles(matched: Match) -> Table:
    from rich.table import Table

    from mq_ao.recipes import get_recipe

    schemes = {str(role): str(spec) for role, spec in get_recipe(DEFAULT_RECIPE).scheme.roles.items()}
    sizes: dict[str, list[int]] = {}
    for role, node in matched.by_role():
        sizes.setdefault(str(role), []).append(_weight(node).meta["val"].numel())
    table = Table(title=f"roles, and how {DEFAULT_RECIPE} quantizes them", title_justify="left")
    for name in ("role", "nodes", "weights", "float32", "int8", "scheme"):
        table.add_column(name, justify="left" if name in ("role", "scheme") else "right")
    for name, counts in sizes.items():
        count = sum(counts)
        columns = (len(counts), count, megabytes(4 * count), megabytes(count), schemes.get(name, "float"))
        table.add_row(name, *map(str, columns))
    return table


def _weight(node: Node) -> Node:
    """The weight's node: the first input of an embedding, the second of everything else."""
    import torch

    weight = node.args[0 if node.target == torch.ops.aten.embedding.default else 1]
    assert isinstance(weight, torch.fx.Node)
    return weight
