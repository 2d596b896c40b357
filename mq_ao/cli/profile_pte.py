"""What `mq-ao inspect --profile` shows: time per operator of a program for ExecuTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mq_ao.cli.console import out, step

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.lowering.executorch.profile import MethodProfile, Timing

_SMALL = 0.01
"""Share of the time below which operators are summed up."""


def show(path: Path, tokens: int | None) -> None:
    """Runs a `.pte` program and prints one table a method.

    Raises:
        MqAoError: see `lowering.executorch.profile.profile`.
    """
    with step(f"profiling {path}"):
        from mq_ao.lowering.executorch.profile import profile

        profiles = profile(path, tokens)
    for method in profiles:
        out().print(_table(method))


def _table(method: MethodProfile) -> Table:
    from rich.table import Table

    runs = len(method.runs)
    what = f"{method.name} of {method.tokens} token{'s' * (method.tokens > 1)} a sequence"
    table = Table(
        title=f"{what}: {_ms(method.total / runs)} ms, the mean of {runs} runs",
        title_justify="left",
        caption=_caption(method),
        caption_justify="left",
    )
    table.add_column("operator")
    for name in ("calls a run", "ms a run", "share", "median ms a call"):
        table.add_column(name, justify="right")
    for name, timing in _sorted(method.operators, method.total):
        table.add_row(*_row(name, timing, method))
        for inner, part in _sorted(timing.inside, method.total):
            table.add_row(*_row(f"  {inner}", part, method), style="dim")
    table.add_row("(between operators)", "", _ms(method.rest / runs), f"{method.rest / method.total:.1%}", "")
    return table


def _caption(method: MethodProfile) -> str:
    cost = "Recording takes time itself."
    delegates = [timing for timing in method.operators.values() if timing.inside]
    if delegates:
        return f"Indented: inside delegates, where times are whole microseconds. {cost}"
    return f"This runtime reports no operators inside delegates. {cost}"


def _sorted(timings: Mapping[str, Timing], total: float) -> Iterator[tuple[str, Timing]]:
    """The largest first; the small ones, where there are several, as one at the end."""
    from mq_ao.lowering.executorch.profile import Timing

    ordered = sorted(timings.items(), key=lambda item: -item[1].total)
    small = [timing for _, timing in ordered if timing.total < _SMALL * total]
    if len(small) < 2:
        yield from ordered
        return
    yield from ordered[: -len(small)]
    yield f"({len(small)} others)", Timing([call for timing in small for call in timing.calls])


def _row(name: str, timing: Timing, method: MethodProfile) -> tuple[str, ...]:
    runs = len(method.runs)
    return (
        name,
        f"{len(timing.calls) / runs:g}",
        _ms(timing.total / runs),
        f"{timing.total / method.total:.1%}",
        _ms(timing.median),
    )


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3f}"
