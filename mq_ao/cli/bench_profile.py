"""`mq-ao bench profile`: where a native program's time goes, and how near operators come to this machine's peaks."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.backends import EXECUTORCH, NATIVE, backend_of
from mq_ao.cli.benching import Json, Threads, chosen_threads, machine, write
from mq_ao.cli.console import check_json, out, ready_kernels, step
from mq_ao.errors import MqAoError
from mq_ao.files import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.lowering.native.stepwise import Phase
    from mq_ao.roofline.machine import Peaks
    from mq_ao.roofline.measured import Line

_SMALL = 0.005
"""Share of the time below which operators are summed up."""


def profile(
    program: Annotated[Path, typer.Argument(help="A saved .ptn program of a language model.")],
    *,
    tokens: Annotated[int, typer.Option(min=2, max=2048, help="Tokens of the prompt.")] = 1024,
    runs: Annotated[int, typer.Option(min=1, help="Runs; medians over them are reported.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Roofline plot to draw, ending in .png or .svg.")] = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Show the time of every operator of a .ptn program, and its share of this machine's measured peaks.

    Bytes and operations are those that the algorithm needs: memory read and written once, multiplications and additions
    as two. Peaks are measured first, in two seconds: reading a large tensor, and products of int8 and of float32
    matrices.

    [bold]Examples[/bold]

    mq-ao bench profile demo.ptn

    mq-ao bench profile mamba-w8a8.ptn --tokens 512 --threads 1 --plot roofline.svg --json profile.json
    """
    check_json(json)
    if (backend := backend_of(program)) is not NATIVE:
        other = f": mq-ao inspect {program} --profile" if backend is EXECUTORCH else ""
        raise MqAoError(f"bench profile takes a {NATIVE.suffix} program, and {program} is none{other}.")
    if plot is not None:
        from mq_ao.plots import check_plot

        check_plot(check_output(plot))
    with step("starting"):
        from mq_ao.lowering.native import stepwise
        from mq_ao.roofline import machine as peaks_of
        from mq_ao.roofline.measured import lines
    threads = chosen_threads(threads)
    ready_kernels()
    with step("measuring this machine's peaks"):
        peaks = peaks_of.measure()
    with step(f"running {program}"):
        phases = stepwise.profile(program, tokens, runs)
    found = {phase.name: lines(phase, peaks) for phase in phases}
    content = {
        phase.name: {
            "tokens": phase.tokens,
            "ms": 1e3 * statistics.median(phase.seconds),
            "operators": [line.to_dict() for line in found[phase.name]],
        }
        for phase in phases
    }
    write({"machine": machine(threads), "peaks": asdict(peaks), "program": program.name, **content}, json)
    if json != "-":
        for phase in phases:
            out().print(_table(phase, found[phase.name], peaks))
        out().print(
            f"Peaks of this machine with {threads} thread(s), measured: {peaks.bandwidth / 1e9:.1f} GB/s read from "
            f"memory, {peaks.int8 / 1e9:.0f} GOP/s of int8 and {peaks.fp32 / 1e9:.0f} of float32 products. A share of "
            "memory beyond 100 %: what is read lies in a cache.",
            soft_wrap=True,
            highlight=False,
        )
    if plot is not None:
        from mq_ao.roofline.plot import save_plot

        titles = {f"{phase.name} of {phase.tokens} token(s)": found[phase.name] for phase in phases}
        save_plot(titles, peaks, plot)


def _table(phase: Phase, found: list[Line], peaks: Peaks) -> Table:
    from rich.table import Table

    whole, alone = statistics.median(phase.seconds), sum(line.seconds for line in found)
    moved = sum(line.cost.moved for line in found)
    table = Table(
        title=f"{phase.name} of {phase.tokens} token(s): {1e3 * whole:.4g} ms, the median of {len(phase.seconds)} runs",
        title_justify="left",
        caption=f"Call by call, from Python: {1e3 * alone:.4g} ms. All bytes once, {moved / 1e6:.0f} MB, would take "
        f"{1e3 * moved / peaks.bandwidth:.4g} ms.",
        caption_justify="left",
    )
    table.add_column("operator")
    table.add_column("shape", no_wrap=True)
    for name in ("calls", "ms", "share", "GB/s", "of peak", "GOP/s", "of peak"):
        table.add_column(name, justify="right", no_wrap=True)
    small = [line for line in found if line.seconds < _SMALL * alone]
    for line in found[: len(found) - len(small)]:
        table.add_row(
            line.operator,
            line.shape,
            str(line.calls),
            f"{1e3 * line.seconds:.3g}",
            f"{line.seconds / alone:.1%}",
            f"{line.cost.moved / line.seconds / 1e9:.3g}",
            f"{line.memory_share:.0%}",
            f"{line.cost.operations / line.seconds / 1e9:.3g}",
            f"{line.compute_share:.0%}",
        )
    if small:
        seconds = sum(line.seconds for line in small)
        calls = str(sum(line.calls for line in small))
        table.add_row(f"({len(small)} others)", "", calls, f"{1e3 * seconds:.3g}", f"{seconds / alone:.1%}")
    return table
