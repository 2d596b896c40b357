"""`mq-ao build-kernels --gpu`: compiles the Triton kernels for GPUs that are not there, and says what they take."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

from mq_ao.cli.console import bar, out, step, write_json
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.ops.triton.offline import Resources


def compile_offline(architectures: str, json: str | None) -> None:
    """Compiles all kernels and prints a table.

    Args:
        architectures: names such as sm_90, with commas between.
        json: where all rows go, too.

    Raises:
        MqAoError: an unknown architecture, no Triton, or a kernel that spills or takes too much shared memory.
    """
    with step("starting"):
        try:
            from mq_ao.ops.triton import IMPLEMENTATIONS
            from mq_ao.ops.triton.offline import SHARED_LIMITS
        except ImportError as error:
            raise MqAoError(f"Triton cannot be imported ({error}): install it, it comes for Linux alone.") from None
    known = {f"sm_{architecture}": architecture for architecture in SHARED_LIMITS}
    wanted = [name.strip() for name in architectures.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise MqAoError(f"unknown architecture {unknown[0]!r}: the architectures are {', '.join(known)}.")
    found: list[tuple[str, Resources]] = []
    tasks = [(operator, known[name]) for name in wanted for operator in IMPLEMENTATIONS]
    # A compilation keeps one core busy.
    workers = ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    with workers, bar("compiling", len(tasks)) as advance:
        for (operator, _), rows in zip(tasks, workers.map(_compiled, tasks), strict=True):
            found += [(operator, row) for row in rows]
            advance()
    out().print(_table(found))
    if json is not None:
        write_json(json, [{"operator": operator, **asdict(row)} for operator, row in found])
    if bad := [row for _, row in found if not row.fits]:
        raise MqAoError(
            f"{len(bad)} of {len(found)} kernels spill or take too much shared memory, the first: {bad[0]}."
        )


def _compiled(task: tuple[str, int]) -> list[Resources]:
    """All kernels of an operator for an architecture."""
    from mq_ao.ops.triton import IMPLEMENTATIONS
    from mq_ao.ops.triton.offline import compile_launches

    operator, architecture = task
    return list(compile_launches(IMPLEMENTATIONS[operator].launches(), architecture))


def _table(found: list[tuple[str, Resources]]) -> Table:
    """A row for each kernel and architecture: the range over all its variants and configurations."""
    from rich.table import Table

    table = Table(
        title="Triton kernels, compiled offline and not run: registers of a thread, spilled bytes, shared memory",
        title_justify="left",
    )
    for column in ("operator", "kernel", "chip", "compiled", "registers", "spilled", "shared, kB"):
        table.add_column(column, justify="left" if column in ("operator", "kernel", "chip") else "right")
    groups: dict[tuple[str, str, int], list[Resources]] = {}
    for operator, row in found:
        groups.setdefault((operator, row.kernel.strip("_"), row.architecture), []).append(row)
    for (operator, kernel, architecture), rows in groups.items():
        table.add_row(
            operator,
            kernel,
            f"sm_{architecture}",
            str(len(rows)),
            _range([row.registers for row in rows]),
            _range([row.spilled for row in rows]),
            _range([round(row.shared / 1024) for row in rows]),
        )
    return table


def _range(values: list[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least}..{most}"
