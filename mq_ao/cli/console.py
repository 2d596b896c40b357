"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from mq_ao import opening
from mq_ao.files import check_output, write_atomically

_WIDTH = 120
"""Columns where the output is no terminal."""


def out() -> Console:
    """Console for results."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def err() -> Console:
    """Console for progress and errors."""
    return Console(stderr=True)


def fail(error: Exception) -> None:
    """Prints an error in red, on one line where its message is one."""
    err().print(Text(f"error: {error}", style="red"), soft_wrap=True)


def show_warnings() -> None:
    """Prints Python warnings as one yellow line each."""
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    err().print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def ready_kernels() -> None:
    """See `opening.ready_kernels`."""
    opening.ready_kernels(step)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Shows a spinner while something of unknown length runs, and leaves a line if it took over a second."""
    console = err()
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield
    seconds = time.perf_counter() - started
    if seconds > 1:
        console.print(Text(f"{what}: {seconds:.1f} s", style="dim"), soft_wrap=True)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a progress bar; yields `advance(count=1, what=None)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
    )
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)

        def advance(count: int = 1, what: str | None = None) -> None:
            progress.update(task, advance=count, description=what)

        yield advance


def check_json(target: str | None) -> str | None:
    """Checks the value of `--json` before long work; "-" is stdout.

    Raises:
        MqAoError: the file cannot be written.
    """
    if target is not None and target != "-":
        check_output(Path(target))
    return target


def write_json(target: str, content: Any) -> None:
    """Writes JSON to stdout ("-") or, in one step, to a file."""
    text = json.dumps(content, indent=2) + "\n"
    if target == "-":
        print(text, end="")
        return
    write_atomically(Path(target), text.encode())


def megabytes(size: float) -> str:
    """A size in MB (10^6 bytes)."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def kernel_counts(kernels: Mapping[str, int]) -> str:
    """Integer kernels in words: `36 linear_packed, 7 qcausal_conv1d`."""
    return ", ".join(f"{count} {kernel_name(name)}" for name, count in kernels.items()) or "none"


def kernel_name(operator: str) -> str:
    """`mq_ao.linear_packed.default` -> `linear_packed`."""
    return operator.removeprefix("mq_ao.").removesuffix(".default")


def said(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a program says of itself, for a table of properties: how it is called in words, without what is counted."""
    unsaid = ("integer_kernels", "methods", "signature", "tokenizer")
    shown = {key: value for key, value in info.items() if key not in unsaid}
    if "tokenizer" in info:
        shown["tokenizer"] = "kept"
    if "signature" in info:
        from mq_ao.lowering.signature import Signature

        shown["inputs"] = str(Signature.read(info["signature"]))
    return shown
