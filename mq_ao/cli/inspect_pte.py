"""What `mq-ao inspect` shows of a program for ExecuTorch, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mq_ao.cli.console import kernel_name, megabytes, out, said, step

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.lowering.executorch.anatomy import Anatomy

_ADDED = "added by ExecuTorch after delegation"


def show(path: Path) -> None:
    """Prints the tables of a `.pte` program; the native operators need not be built.

    Raises:
        MqAoError: the file is missing or not ours, or executorch is not installed.
    """
    with step(f"reading {path}"):
        from mq_ao.lowering.executorch import anatomy
        from mq_ao.lowering.executorch.program import open_program

        _, info = open_program(path)
        parts = anatomy.read(path)
    console = out()
    console.print(_properties(path, info, parts))
    if info["integer_kernels"]:
        console.print(_kernels(info["integer_kernels"]))
    else:
        console.print("no integer kernels: a float program")
    console.print(_methods(info["methods"], parts))
    console.print(_outside(info["methods"], parts))
    console.print(_sizes(parts))


def _properties(path: Path, info: Mapping[str, Any], parts: Anatomy) -> Table:
    from rich.table import Table

    table = Table("property", "value", title=str(path), title_justify="left")
    table.add_row("file", megabytes(parts.file_bytes))
    for key, value in said(info).items():
        table.add_row(key, _words(value))
    return table


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return ", ".join(f"{item['name']} {_words(item['sizes'])}" for item in value)  # states
    if isinstance(value, list):
        sizes = value and all(isinstance(item, int) for item in value)
        return (" x " if sizes else ", ").join(map(str, value)) or "none"
    return str(value)


def _kernels(kernels: Mapping[str, int]) -> Table:
    from rich.table import Table

    table = Table("integer kernel", "calls a prefill")
    for name, count in kernels.items():
        table.add_row(kernel_name(name), str(count))
    return table


def _methods(methods: Mapping[str, Any], parts: Anatomy) -> Table:
    from rich.table import Table

    table = Table(
        title="methods",
        title_justify="left",
        caption="Memory is what is planned ahead; all methods share the states. What delegates allocate comes on top.",
        caption_justify="left",
    )
    table.add_column("method")
    table.add_column("instructions", justify="right")
    table.add_column("delegates", justify="right")
    table.add_column("linears in XNNPACK")
    table.add_column("linears outside", justify="right")
    table.add_column("during a call", justify="right")
    table.add_column("states", justify="right")
    for name, method in methods.items():
        plan = parts.methods[name]
        table.add_row(
            name,
            str(plan.count),
            str(plan.delegates),
            "\n".join(_linears(method)) or "none",
            str(method["linears_outside"]),
            megabytes(plan.activation_bytes),
            megabytes(plan.state_bytes),
        )
    return table


def _linears(method: Mapping[str, Any]) -> Iterator[str]:
    integer: dict[str, int] = method["integer_linears"]
    for kind, count in integer.items():
        yield f"{count} {kind}"
    if number := method["inside"].get("linear", 0) - sum(integer.values()):
        yield f"{number} float"


def _outside(methods: Mapping[str, Any], parts: Anatomy) -> Table:
    """Of the methods that a model runs in: reset only writes zeros."""
    from rich.table import Table

    shown = [name for name in methods if name != "reset"]
    table = Table(title="operators outside delegates", title_justify="left")
    table.add_column("operator")
    for name in shown:
        table.add_column(f"calls a {name}", justify="right")
    table.add_column("why")
    counts = {name: parts.methods[name].operators for name in shown}
    # One that runs as other operators in the file, like a loop, is told by those.
    for operator in dict.fromkeys(operator for method in counts.values() for operator in method):
        reasons = [methods[name]["reasons"].get(operator, _ADDED) for name in shown if operator in counts[name]]
        numbers = (str(counts[name].get(operator, 0)) for name in shown)
        table.add_row(operator, *numbers, "; ".join(dict.fromkeys(reasons)))
    if any("body of" in reason for name in shown for reason in methods[name]["reasons"].values()):
        table.caption = "An operator in the body of a loop is counted once, and runs once a token."
        table.caption_justify = "left"
    return table


def _sizes(parts: Anatomy) -> Table:
    from rich.table import Table

    table = Table("part of the file", title="size by part", title_justify="left", show_footer=True)
    table.columns[0].footer = "file"
    table.add_column("bytes", justify="right", footer=str(parts.file_bytes))
    table.add_column("share", justify="right")
    rows = {
        "weights and scales that delegates read": parts.weight_bytes,
        "graphs of delegates": parts.graph_bytes,
        "constants outside delegates": parts.constant_bytes,
        "instructions, properties, padding": parts.other_bytes,
    }
    for name, size in rows.items():
        table.add_row(name, str(size), f"{size / parts.file_bytes:.1%}")
    return table
