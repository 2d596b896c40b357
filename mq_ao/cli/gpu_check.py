"""`mq-ao gpu-check`: all that is to be found out on a GPU, in one command with a budget of time."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.console import err, out, step
from mq_ao.errors import MqAoError
from mq_ao.files import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.gpu_check.plan import Stage
    from mq_ao.gpu_check.results import Results
    from mq_ao.gpu_check.settings import Setting

SLOWER = 8.0
"""Times a stage's seconds that a rehearsal is given: the interpreter is slow."""


def gpu_check(
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="File with all results, written as they come; an existing one is continued."
        ),
    ] = Path("gpu-check.json"),
    minutes: Annotated[float, typer.Option(min=0.0, help="Budget: no stage begins that is thought not to fit.")] = 6.0,
    device: Annotated[str, typer.Option(help="cuda, a GPU of several such as cuda:1, or cpu to rehearse.")] = "cuda",
    stage: Annotated[list[str] | None, typer.Option(help="A stage to run; repeat for several. Default: all.")] = None,
    again: Annotated[
        list[str] | None,
        typer.Option(help="A stage to run though it has results, or failed: the parts that failed. Repeatable."),
    ] = None,
    prepared: Annotated[Path | None, typer.Option(help="Folder that --prepare made, to save time here.")] = None,
    prepare: Annotated[
        Path | None,
        typer.Option(help="Make that folder, and check nothing: on any machine with the GPU's version of PyTorch."),
    ] = None,
) -> None:
    """Check the GPU: kernels, programs, speed beside fp16 and the roofline, in stages with a budget of time.

    A stage that fails or hangs is a result, and the next ones go on; what was found is in the file at once. Run again
    with the same file, only what has not run is run. Exit code 1: something failed.

    [bold]Examples[/bold]

    mq-ao gpu-check -o gpu.json --minutes 6

    mq-ao gpu-check -o gpu.json --again kernels --again failed

    mq-ao gpu-check --device cpu -o rehearsal.json --minutes 30

    mq-ao gpu-check --prepare .whl/prepared && mq-ao gpu-check --prepared .whl/prepared
    """
    if device != "cpu" and device.split(":", maxsplit=1)[0] != "cuda":
        raise MqAoError(f"unknown device {device!r}: it is cuda, a GPU of several such as cuda:1, or cpu to rehearse.")
    if prepared is not None and not prepared.is_dir():
        raise MqAoError(f"there is no folder {prepared}: make it with mq-ao gpu-check --prepare {prepared}.")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    with step("starting"):
        from mq_ao.gpu_check.plan import FAILED, STAGES, chosen
        from mq_ao.gpu_check.results import Verdict
        from mq_ao.gpu_check.settings import REAL, REHEARSED, Setting
    wanted = chosen(stage, "--stage") if stage else list(STAGES)
    chosen(again or (), "--again", (FAILED,))
    setting = Setting(device, REHEARSED if device == "cpu" else REAL, prepared=prepared)
    if prepare is not None:
        _prepare(prepare)
        return
    check_output(output)
    results = check(wanted, setting, output, minutes, again or [])
    out().print(_table(results, wanted, setting))
    out().print(f"All results are in {output}.", markup=False, highlight=False, soft_wrap=True)
    if any(found.count(Verdict.FAILED) for found in results.stages.values()):
        sys.exit(1)


def check(wanted: list[Stage], setting: Setting, output: Path, minutes: float, again: list[str]) -> Results:
    """Runs stages and shows which; see `gpu_check.runner.run`."""
    from mq_ao.gpu_check.results import Results
    from mq_ao.gpu_check.runner import Budget, run

    results = Results(output, _head(setting))
    budget = Budget(60 * minutes, SLOWER if setting.rehearsal else 1.0)
    with ExitStack() as shown:

        def told(what: str) -> None:
            shown.close()  # the line of what came before
            shown.enter_context(step(what))

        run(wanted, setting, results, budget, again, told)
    return results


def _head(setting: Setting) -> dict[str, Any]:
    """What all results depend on.

    Raises:
        MqAoError: there is no such GPU.
    """
    from mq_ao.gpu_check.machine import described, versions

    return {"rehearsal": setting.rehearsal, "versions": versions(), **described(setting)}


def _prepare(folder: Path) -> None:
    from mq_ao.gpu_check.prepared import PREPARED_TEXT, prepare
    from mq_ao.gpu_check.settings import REAL

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MqAoError(f"the folder {folder} cannot be made: {error.strerror}.") from None
    prepare(replace(REAL, text=PREPARED_TEXT), folder, step)
    err().print(f"prepared: {folder}", markup=False, highlight=False, soft_wrap=True)


def _table(results: Results, wanted: list[Stage], setting: Setting) -> Table:
    """Stages and how they ended; below each what failed or did not run."""
    from rich.table import Table
    from rich.text import Text

    from mq_ao.gpu_check.results import REHEARSAL, Verdict

    title = REHEARSAL if setting.rehearsal else "gpu-check"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "verdict", "seconds", *Verdict, "why"):
        table.add_column(column, justify="left" if column in ("stage", "verdict", "why") else "right")
    for stage in wanted:
        found = results.stages[stage.name]
        counts = [str(found.count(verdict)) for verdict in Verdict]
        reasons = [f"{name}: {part.reason}" for name, part in found.parts.items() if part.reason is not None]
        why = "\n".join(dict.fromkeys([*([found.reason] if found.reason else []), *reasons]))
        table.add_row(stage.name, str(found.verdict), f"{found.seconds:.0f}", *counts, Text(why))
    return table
