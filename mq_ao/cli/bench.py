"""`mq-ao bench`: float and int8 programs, and other libraries, side by side in one run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.backends import DEFAULT, get_backend
from mq_ao.cli.bench_gpu import gpu
from mq_ao.cli.bench_kernels import kernels
from mq_ao.cli.bench_profile import profile
from mq_ao.cli.bench_quantize import quantize
from mq_ao.cli.bench_serve import serve
from mq_ao.cli.benching import (
    CONTEXTS,
    DECODE_TOKENS,
    LENGTHS,
    REPEATS,
    Contexts,
    DecodeTokens,
    Json,
    Lengths,
    Models,
    Recipes,
    Repeats,
    Threads,
    chosen_models,
    chosen_recipes,
    chosen_threads,
    machine,
    parse_lengths,
    show,
    write,
)
from mq_ao.cli.console import bar, check_json, ready_kernels, step
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from mq_ao.bench.prepare import Peer
    from mq_ao.bench.results import Results
    from mq_ao.bench.runner import Plan
    from mq_ao.recipes import Recipe

app = typer.Typer(subcommand_metavar="[gpu | kernels | profile | quantize | serve]", rich_markup_mode="rich")
app.command("gpu")(gpu)
app.command("kernels")(kernels)
app.command("profile")(profile)
app.command("quantize")(quantize)
app.command("serve")(serve)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    *,
    model: Models = None,
    tokens: Lengths = LENGTHS,
    contexts: Contexts = CONTEXTS,
    decode_tokens: DecodeTokens = DECODE_TOKENS,
    repeats: Repeats = REPEATS,
    patience: Annotated[
        float,
        typer.Option(min=0, help="Seconds at one length after which a contender sits out its remaining rounds."),
    ] = 60.0,
    peers: Annotated[
        str | None,
        typer.Option(help="transformers, llama.cpp: comma-separated; none: only ours. Default: all installed ones."),
    ] = None,
    recipe: Recipes = None,
    backend: Annotated[
        str, typer.Option(help="What runs ours: native, inductor, or executorch (.pte).")
    ] = DEFAULT.name,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Time prefill and decode and measure memory, of our fp32 and int8 programs and of other libraries.

    Contenders have the same weights, run in a process of their own, and take turns. Every prefill computes
    the logits of the last token only. Of several recipes each makes a contender, and the times of the others
    are set against the first one's, round by round. What else can be measured are commands, with options
    of their own.

    [bold]Examples[/bold]

    mq-ao bench

    mq-ao bench --model mamba-130m --tokens 1024 --peers none --json bench.json

    mq-ao bench --model mamba-130m --recipe rtn-w8a8 --recipe mambaquant-w8a8 --peers none

    mq-ao bench --model bamba-350m --recipe mambaquant-w8a8 --peers none --tokens 1024 --contexts 1024,16384

    mq-ao bench --model mamba-130m --backend executorch --recipe mambaquant-w8a8 --tokens 128,512
    """
    if context.invoked_subcommand is not None:
        _check_nothing_stands_before(context, context.invoked_subcommand)
        return
    check_json(json)
    lengths, before = parse_lengths(tokens), parse_lengths(contexts, "--contexts")
    with step("starting"):
        from mq_ao.bench.prepare import installed_peers, parse_peers
        from mq_ao.bench.runner import Plan
        from mq_ao.bench.table import render
    get_backend(backend)
    threads = chosen_threads(threads)
    recipes = [*chosen_recipes(recipe).values()]
    names = [name for name in (peers or "").split(",") if name]
    chosen = installed_peers() if peers is None else [] if names == ["none"] else parse_peers(names)
    ready_kernels()
    plan = Plan(lengths, repeats, decode_tokens, before, patience)
    runs = []
    for source in chosen_models(model):
        runs.append(_run(source, plan, chosen, recipes, backend, threads))
        if json != "-":
            show(render(runs[-1]))
    content = {"backend": backend, "recipes": [item.name for item in recipes], "repeats": repeats}
    write({"machine": machine(threads), **content, "models": [run.to_dict() for run in runs]}, json)
    for run in runs:
        if (failure := run.own_failure) is not None:
            raise MqAoError(failure)


def _check_nothing_stands_before(context: typer.Context, command: str) -> None:
    """Raises MqAoError if there are options between `bench` and a command, where they would not count."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise MqAoError(
            f"options before {command} do not count ({options}): give its own after it (mq-ao bench {command} --help)."
        )


def _run(source: str, plan: Plan, peers: list[Peer], recipes: list[Recipe], backend: str, threads: int) -> Results:
    from mq_ao.bench.prepare import open_model, prepare
    from mq_ao.bench.runner import Bench

    with step(f"loading {source}"):
        model = open_model(source)
    vocab_size = model.config.vocab_size
    with tempfile.TemporaryDirectory(prefix="mq_ao_bench_") as folder:
        specs = prepare(
            model,
            Path(folder),
            recipes=recipes,
            peers=peers,
            threads=threads,
            longest=plan.longest,
            backend=backend,
            step=step,
        )
        del model
        return Bench(source, specs, vocab_size, plan).run(step, bar)
