"""`mq-ao bench gpu`: one command on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.benching import (
    DECODE_TOKENS,
    LENGTHS,
    REPEATS,
    DecodeTokens,
    Json,
    Lengths,
    Models,
    Recipes,
    Repeats,
    chosen_models,
    chosen_recipes,
    chosen_threads,
    machine,
    parse_lengths,
    write,
)
from mq_ao.cli.console import check_json, megabytes, out, step
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.bench.gpu import Plan, Row
    from mq_ao.recipes import Recipe


def gpu(
    *,
    model: Models = None,
    tokens: Lengths = LENGTHS,
    decode_tokens: DecodeTokens = DECODE_TOKENS,
    repeats: Repeats = REPEATS,
    recipe: Recipes = None,
    device: Annotated[str, typer.Option(help="cuda, or a GPU of several, such as cuda:1.")] = "cuda",
    json: Json = None,
) -> None:
    """Time prefill and decode on a GPU, of fp16 in eager mode and compiled, mamba_ssm's kernels, and ours.

    Logits are compared with those of the same program on the CPU first.

    [bold]Examples[/bold]

    mq-ao bench gpu --model mamba-130m --recipe mambaquant-w8a8 --json gpu.json

    mq-ao bench gpu --model mamba-130m --tokens 1024 --recipe rtn-w8a8 --recipe mambaquant-w8a8 --device cuda:1
    """
    check_json(json)
    lengths = parse_lengths(tokens)
    if device.split(":", maxsplit=1)[0] != "cuda":
        raise MqAoError(f"unknown device {device!r}: it is cuda, or a GPU of several, such as cuda:1.")
    with step("starting"):
        from mq_ao.bench.gpu import Plan
    host = machine(chosen_threads(None))
    recipes = [*chosen_recipes(recipe).values()]
    bench_gpu(chosen_models(model), recipes, Plan(lengths, decode_tokens, repeats), device, host, json)


def bench_gpu(
    models: Sequence[str], recipes: Sequence[Recipe], plan: Plan, device: str, host: dict[str, Any], json: str | None
) -> None:
    """Benches every model and prints a table of each.

    Raises:
        MqAoError: there is no GPU that can run it.
    """
    import torch

    from mq_ao.bench.gpu import run
    from mq_ao.bench.prepare import open_model
    from mq_ao.lowering.cuda import require_cuda
    from mq_ao.models import MambaLM

    wanted = torch.device(device)
    if wanted.type == "cuda":
        require_cuda(wanted)
        host = {**host, "gpu": torch.cuda.get_device_name(wanted)}
    results = []
    for source in models:
        with step(f"loading {source}"):
            model = open_model(source)
        if not isinstance(model, MambaLM):
            raise MqAoError(f"{source} is a model of transformers: this bench takes Mamba and Mamba-2.")
        rows, left_out = run(model, recipes, plan, wanted, step)
        results.append({"model": source, "rows": [row.to_dict() for row in rows], "left out": left_out})
        if json != "-":
            out().print(_table(source, rows, plan))
            for reason in left_out:
                out().print(f"left out: {reason}", markup=False, soft_wrap=True)
    write({"machine": host, "device": device, "mode": str(plan.mode), "models": results}, json)


def _table(source: str, rows: list[Row], plan: Plan) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{source}: medians of {plan.repeats} rounds in turns; x: against the first; compiled: {plan.mode}",
        title_justify="left",
    )
    lengths = [f"prefill {tokens}, ms" for tokens in plan.tokens]
    for column in ("contender", *lengths, "decode, ms", "weights", "memory", "logits off"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    first = rows[0]
    for row in rows:
        prefills = [_against(row.prefill_ms[tokens], first.prefill_ms[tokens]) for tokens in plan.tokens]
        memory = "" if row.memory_bytes is None else megabytes(row.memory_bytes)
        error = "" if row.error is None else f"{row.error:.1e}"
        decode = _against(row.decode_ms, first.decode_ms)
        table.add_row(row.name, *prefills, decode, megabytes(row.weight_bytes), memory, error)
    return table


def _against(value: float, first: float) -> str:
    return f"{value:.2f} ({first / value:.2f}x)"
