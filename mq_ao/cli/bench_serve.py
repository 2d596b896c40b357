"""`mq-ao bench serve`: the server under many clients."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from mq_ao.backends import DEFAULT
from mq_ao.cli.benching import Json, Models, Threads, chosen_models, chosen_threads, machine, write
from mq_ao.cli.console import check_json, out, ready_kernels, step
from mq_ao.extras import needs


def serve(
    *,
    model: Models = None,
    recipe: Annotated[str, typer.Option(help="How ours is quantized.")] = "mambaquant-w8a8",
    clients: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    beginning: Annotated[int, typer.Option(min=1, help="Tokens that prompts begin with in common.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians over them are reported.")] = 3,
    at: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a server to ask beside ours, in words. May be repeated.")
    ] = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure tokens a second of many clients against one after the other, and the first token behind a kept beginning.

    [bold]Examples[/bold]

    mq-ao bench serve --model demo

    mq-ao bench serve --model mamba-130m --clients 32 --json serving.json

    mq-ao bench serve --model mamba-130m --at localhost:8080
    """
    check_json(json)
    with step("starting"), needs("the server", "serve"):
        import_module("mq_ao.serving.app")  # before anything takes long: it says what it lacks
        from mq_ao import api
        from mq_ao.bench.prepare import calibration_of, open_model
        from mq_ao.bench.serving import Load, measure, served
        from mq_ao.bench.shapes import save_words
    threads = chosen_threads(threads)
    ready_kernels()
    load = Load(clients, tokens, beginning=beginning, rounds=repeats)
    costs = []

    def ask(name: str, address: str, vocab_size: int | None) -> None:
        with step(f"asking {name}"):
            costs.append(measure(name, address, vocab_size, load))
        if json != "-":
            out().print(_text(costs[-1]))

    for source in chosen_models(model):
        with tempfile.TemporaryDirectory(prefix="mq_ao_bench_") as folder, ExitStack() as stack:
            path = Path(folder) / f"{Path(source).name}{DEFAULT.suffix}"
            with step(f"quantizing {source} ({recipe})"):
                opened = open_model(source)
                quantized = api.quantize(opened, calibration_of(opened), recipe)
            with step(f"lowering {source}"):
                quantized.lower().save(path)
            words = save_words(opened.config.vocab_size, Path(folder) / "words")
            with step(f"starting the server of {source}"):
                address = stack.enter_context(served(str(path), "--tokenizer", str(words)))
            ask(source, address, opened.config.vocab_size)
    for address in at or ():
        ask(address, address, None)
    write({"machine": machine(threads), "recipe": recipe, "serving": [cost.to_dict() for cost in costs]}, json)


def _text(cost: object) -> str:
    from mq_ao.bench.serving import ServingCost

    assert isinstance(cost, ServingCost)
    load = cost.load
    return (
        f"{cost.model}: {load.clients} clients x {load.tokens} tokens at a time {cost.all:.0f} tokens/s, one after the "
        f"other {cost.one:.0f} ({cost.all / cost.one:.2f}x)\n"
        f"first token behind {load.beginning} tokens: new {1e3 * cost.fresh:.0f} ms, kept {1e3 * cost.kept:.1f} ms "
        f"({cost.fresh / cost.kept:.1f}x)"
    )
