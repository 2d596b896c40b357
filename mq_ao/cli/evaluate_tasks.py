"""`mq-ao eval --tasks`: tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mq_ao.cli.console import out, step, write_json
from mq_ao.errors import MqAoError, first_line


def evaluate_tasks(
    model: str,
    tokenizer: str | None,
    tasks: str,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    json: str | None,
    others: Mapping[str, Any],
) -> None:
    """Runs tasks and prints their metrics.

    Args:
        model: as the user named it.
        tokenizer: tokenizer that the user named, or None.
        tasks: their names, with commas between.
        include_path: folder with more tasks.
        num_fewshot: examples before each question; None: as the task has it.
        limit: questions of each task at most.
        json: where the figures go.
        others: options for a text, none of which may be given.

    Raises:
        MqAoError: lm-evaluation-harness is not installed, a task is not known or its data cannot be had, or the model
            cannot be loaded.
    """
    if given := [name for name, value in others.items() if value is not None]:
        raise MqAoError(f"{', '.join(given)} is for a text, and --tasks runs tasks: leave one of them out.")
    names = [name for part in tasks.split(",") if (name := part.strip())]
    with step("starting lm-evaluation-harness"):
        from mq_ao.integrations.lm_eval import MqAoLM, results

    with step(f"loading {model}"):
        loaded = MqAoLM(model, tokenizer)
    try:
        found = results(loaded, names, include_path, num_fewshot, limit)
    except MqAoError:
        raise
    except Exception as error:  # of data sets and tasks, of any kind
        reason = first_line(error, type(error).__name__)
        raise MqAoError(f"lm-evaluation-harness cannot run {tasks}: {reason}") from error
    if json is not None:
        write_json(json, {"model": model, "weight_bytes": loaded.opened.weight_bytes, "tasks": found})
    if json != "-":
        _print(model, found)


def _print(model: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title=model, title_justify="left")
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, metrics in found.items():
        for metric, (value, error) in metrics.items():
            table.add_row(task, metric, f"{value:.4f}", "-" if error is None else f"{error:.4f}")
    out().print(table)
