"""`mq-ao inspect`: what is recognised in a model, or what a saved program consists of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.console import megabytes, out, step
from mq_ao.cli.opened import ANY_HELP, is_program, open_float

if TYPE_CHECKING:
    from mq_ao.graph import Match
    from mq_ao.models import MambaLM


def inspect(model: Annotated[str, typer.Argument(help=ANY_HELP)]) -> None:
    """Show a model's blocks and which part plays which role, or a saved program's recipe and kernels.

    [bold]Examples[/bold]

    mq-ao inspect demo

    mq-ao inspect demo-w8a8.pt2
    """
    if is_program(model):
        _program(Path(model))
    else:
        _model(model)


def _program(path: Path) -> None:
    from rich.table import Table

    with step(f"loading {path}"):
        from mq_ao.api import load

        program = load(path)
    console = out()
    table = Table("property", "value", title=str(path), title_justify="left")
    rows: Mapping[str, Any] = {
        "file": megabytes(path.stat().st_size),
        "resident weights": megabytes(program.weight_bytes),
        **{key: value for key, value in program.info.items() if key != "integer_kernels"},
    }
    for key, value in rows.items():
        table.add_row(key, str(value))
    console.print(table)
    if not program.integer_kernels:
        console.print("no integer kernels: a float program")
        return
    kernels = Table("integer kernel", "calls a forward pass")
    for name, count in program.integer_kernels.items():
        kernels.add_row(name, str(count))
    console.print(kernels)


def _model(source: str) -> None:
    model = open_float(source)
    with step("capturing"):
        from mq_ao.api import capture
        from mq_ao.graph import match

        matched = match(capture(model, ()))
    console = out()
    console.print(matched.describe(), markup=False, highlight=False, soft_wrap=True)
    console.print(_roles(model, matched))
    total = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{total} parameters, {megabytes(4 * total)} in float32 ({model.config})", markup=False, soft_wrap=True)


def _roles(model: MambaLM, matched: Match) -> Any:
    from rich.table import Table

    from mq_ao.quantizer import w8a8

    scheme = w8a8().roles
    sizes: dict[str, list[int]] = {}
    for role, node in matched.by_role():
        value = node.args[1 if str(role) != "embedding" else 0].meta["val"]
        sizes.setdefault(str(role), []).append(value.numel())
    table = Table(title="roles, and how rtn-w8a8 quantizes them", title_justify="left")
    for name in ("role", "nodes", "weights", "float32", "int8", "scheme"):
        table.add_column(name, justify="left" if name in ("role", "scheme") else "right")
    schemes = {str(role): str(spec) for role, spec in scheme.items()}
    for name, counts in sizes.items():
        count = sum(counts)
        table.add_row(
            name, str(len(counts)), str(count), megabytes(4 * count), megabytes(count), schemes.get(name, "float")
        )
    return table
