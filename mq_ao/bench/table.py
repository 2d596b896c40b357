"""A bench's results as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mq_ao.bench.quantizing import QuantizingCost
from mq_ao.bench.results import Measured, Results
from mq_ao.bench.runner import PROMPT_TOKENS
from mq_ao.bench.worker import Memory


def render(results: Results) -> list[Table | str]:
    """A table of times, a table of memory, and notes below them."""
    return [_times(results), _sizes(results), *_notes(results)]


_NAME_WIDTH = 24
"""Columns that a contender's name has at least; it is folded where it is longer and the table has no room."""


def _times(results: Results) -> Table:
    base = results.contenders[results.quantized[0]]
    table = Table(title=f"{results.model}: medians (times that of {base.name})", title_justify="left")
    table.add_column("", overflow="fold", min_width=_NAME_WIDTH)
    for tokens in results.lengths:
        table.add_column(f"{tokens} tokens\nms", justify="right", no_wrap=True)
    for context in results.contexts:
        after = "" if len(results.contexts) == 1 else f" after\n{context} tokens,"
        table.add_column(f"decode{after}\nms a token", justify="right", no_wrap=True)
    table.add_column("first token\nms", justify="right", no_wrap=True)
    for row in results.contenders.values():
        prefill = [_against(row.prefill_median(n), base.prefill_median(n)) for n in results.lengths]
        decode = [_against(row.decode_median(n), base.decode_median(n)) for n in results.contexts]
        start, first = row.start_median(), base.start_median()
        seconds = "-" if start is None else _against(start.seconds, None if first is None else first.seconds)
        table.add_row(row.name, *prefill, *decode, seconds)
    return table


def _sizes(results: Results) -> Table:
    table = Table(title="memory in MB, and exactness", title_justify="left")
    table.add_column("", overflow="fold", min_width=_NAME_WIDTH)
    for name in ("weights", "start", "decoding, peak\n(libraries)", "logits\noff by"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results.contenders.values():
        weights = "-" if row.memory is None else f"{row.memory.weight_bytes / 1e6:.1f}"
        memory = "-" if row.memory is None else _memory(row.memory)
        error = "-" if row.logits_error is None else f"{row.logits_error:.1e}"
        start = row.start_median()
        started = "-" if start is None else f"{start.peak / 1e6:.0f}"
        table.add_row(row.name, weights, started, memory, error)
    return table


def _memory(memory: Memory) -> str:
    decoding = "-" if memory.decoding is None else f"{memory.decoding / 1e6:.0f}"
    return f"{decoding}, {memory.peak / 1e6:.0f} ({memory.libraries / 1e6:.0f})"


def _against(seconds: float | None, base: float | None) -> str:
    if seconds is None:
        return "-"
    ms = 1e3 * seconds
    text = f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
    return text if base is None else f"{text} ({seconds / base:.2f}x)"


def _notes(results: Results) -> list[str]:
    notes = [f"{figure.name}: {figure.value:.3g}x" for figure in results.own_figures()]
    notes += [
        f"First token: from opening the model, libraries imported, through a prompt of {PROMPT_TOKENS}. Start: most "
        f"memory up to then and while {results.decode_tokens} tokens were decoded, without the libraries'.",
        "Prefill computes the last token's logits only. Memory is that of the contender's process, interpreter and "
        "libraries (in brackets) included: while it decodes, and at most, opening included. Logits: relative L2 "
        "distance to the first row's.",
    ]
    most = max((len(samples) for row in results.contenders.values() for samples in row.prefill.values()), default=0)
    for row in results.contenders.values():
        if row.failure is not None:
            notes.append(f"{row.failure} (left out from there on)")
        elif fewer := _fewer(row, most):
            notes.append(f"{row.name}: fewer rounds ({fewer}), as it had spent its --patience.")
    return notes


def _fewer(row: Measured, most: int) -> str:
    short = [(tokens, len(samples)) for tokens, samples in row.prefill.items() if len(samples) < most]
    return ", ".join(f"{count} at {tokens} tokens" for tokens, count in short)


def render_quantizing(costs: Sequence[QuantizingCost]) -> list[Table | str]:
    """A row a model and recipe, and what its columns mean."""
    table = Table()
    for name in ("model", "recipe"):
        table.add_column(name)
    for name in (
        "tokens",
        "seconds",
        "fp32 weights\nMB",
        "peak MB\n(libraries)",
        "of fp32\nweights",
        "without\nlibraries",
    ):
        table.add_column(name, justify="right")
    for row in costs:
        memory = f"{row.peak / 1e6:.0f} ({row.libraries / 1e6:.0f})"
        weights = f"{row.float_bytes / 1e6:.1f}"
        ratios = (f"{row.ratio:.2f}x", f"{row.own_ratio:.2f}x")
        table.add_row(row.model, row.recipe, str(row.tokens), f"{row.seconds:.1f}", weights, memory, *ratios)
    note = (
        "Seconds: capture, statistics, rewrites, calibration and conversion, without loading and compiling. Peak "
        "memory is that of the process: interpreter and libraries (in brackets: before the model was loaded), the "
        "float model and quantizing it."
    )
    return [table, note]
