"""`mq-ao bench`: float and int8 programs, and other libraries, side by side in one run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.backends import get_backend
from mq_ao.cli.console import bar, check_json, out, ready_kernels, step, write_json
from mq_ao.cli.opened import MODEL_HELP
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from rich.table import Table

    from mq_ao.bench.prepare import Peer
    from mq_ao.bench.results import Results
    from mq_ao.bench.runner import Plan
    from mq_ao.recipes import Recipe


def bench(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"mamba-130m (random weights), {MODEL_HELP} May be repeated. Default: demo and mamba-130m."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Prefill lengths, comma-separated.")] = "128,1024,4096",
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens a decode measurement.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians over them are reported.")] = 5,
    patience: Annotated[
        float,
        typer.Option(min=0, help="Seconds at one length after which a contender sits out its remaining rounds."),
    ] = 60.0,
    peers: Annotated[
        str | None,
        typer.Option(help="transformers, llama.cpp: comma-separated; none: only ours. Default: all installed ones."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="How ours is quantized: a name or a file. May be repeated. Default: rtn-w8a8."),
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs ours: inductor, or executorch (.pte programs).")] = "inductor",
    device: Annotated[
        str, typer.Option(help="cpu; or cuda: a bench of its own on a GPU, where --backend and --peers have no part.")
    ] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every contender. Default: all cores.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time the scan kernels against an int8 matmul.")] = False,
    quantize: Annotated[
        bool, typer.Option("--quantize", help="Measure time and memory of quantizing itself, a process each.")
    ] = False,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens that --quantize calibrates on.")] = 16384,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")
    ] = None,
) -> None:
    """Time prefill and decode and measure memory, of our fp32 and int8 programs and of other libraries.

    Contenders have the same weights, run in a process of their own, and take turns. Every prefill computes
    the logits of the last token only. Of several recipes each makes a contender, and the times of the others
    are set against the first one's, round by round.

    [bold]Examples[/bold]

    mq-ao bench

    mq-ao bench --model mamba-130m --tokens 1024 --peers none --json bench.json

    mq-ao bench --model mamba-130m --recipe rtn-w8a8 --recipe mambaquant-w8a8 --peers none

    mq-ao bench --model mamba-130m --backend executorch --recipe mambaquant-w8a8 --tokens 128,512

    mq-ao bench --device cuda --model mamba-130m --recipe mambaquant-w8a8 --json gpu.json

    mq-ao bench --kernels

    mq-ao bench --quantize --model mamba-130m --recipe mambaquant-w8a8
    """
    check_json(json)
    lengths = _lengths(tokens)
    threads = threads or _cores()
    with step("starting"):
        import torch

        from mq_ao.bench.prepare import installed_peers, int8_names, parse_peers
        from mq_ao.bench.runner import Plan
        from mq_ao.bench.table import render
        from mq_ao.recipes import get_recipe
    get_backend(backend)
    torch.set_num_threads(threads)
    content: dict[str, Any] = {"machine": _machine(threads)}
    if kernels:
        ready_kernels()
        _kernels(content, json)
        return
    named = recipe or ["rtn-w8a8"]
    recipes = [get_recipe(item) for item in named]
    int8_names(recipes)
    models = model or ["demo", "mamba-130m"]
    if device != "cpu":
        from mq_ao.bench import gpu
        from mq_ao.cli.bench_gpu import bench_gpu

        gpu_plan = gpu.Plan(tuple(lengths), decode_tokens, repeats)
        bench_gpu(models, recipes, gpu_plan, _gpu(device), content["machine"], json)
        return
    if quantize:
        ready_kernels()
        _quantizing(content, [(source, item) for source in models for item in named], calibration_tokens, threads, json)
        return
    names = [name for name in (peers or "").split(",") if name]
    chosen = installed_peers() if peers is None else [] if names == ["none"] else parse_peers(names)
    ready_kernels()
    plan = Plan(tuple(lengths), repeats, decode_tokens, patience)
    runs = []
    for source in models:
        runs.append(_run(source, plan, chosen, recipes, backend, threads))
        if json != "-":
            _print(render(runs[-1]))
    content |= {"backend": backend, "recipes": [item.name for item in recipes], "repeats": repeats}
    _write({**content, "models": [run.to_dict() for run in runs]}, json)
    for run in runs:
        if (failure := run.own_failure) is not None:
            raise MqAoError(failure)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise MqAoError(f"--tokens is {text!r}: give whole numbers, comma-separated, such as 128,1024.") from None
    if min(lengths) < 1:
        raise MqAoError(f"--tokens is {text!r}: a prefill has at least one token.")
    return sorted(set(lengths))


def _gpu(device: str) -> str:
    if device.split(":", maxsplit=1)[0] != "cuda":
        raise MqAoError(f"unknown device {device!r}: it is cpu or cuda, or a GPU of several, such as cuda:1.")
    return device


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(threads: int) -> dict[str, Any]:
    import platform

    import torch

    from mq_ao import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "threads": threads, "torch": torch.__version__, "mq_ao": __version__}


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


def _kernels(content: dict[str, Any], json: str | None) -> None:
    from dataclasses import asdict

    from mq_ao.bench.kernels import D_MODEL, KERNELS, LENGTH, measure

    times = {}
    for kernel in KERNELS:
        with step(f"timing {kernel.name}"):
            times[kernel] = measure(kernel)
    _write({**content, "kernels": {kernel.name: asdict(taken) for kernel, taken in times.items()}}, json)
    if json != "-":
        for kernel, taken in times.items():
            out().print(
                f"{kernel.name}, {kernel.shape}, fp32: {taken.scan_ms:.2f} ms; "
                f"torch._int_mm, {LENGTH} x {D_MODEL} x {kernel.in_proj}: {taken.int_mm_ms:.2f} ms; "
                f"ratio {taken.ratio:.2f}; recurrence in PyTorch: {taken.recurrence_ms:.0f} ms",
                soft_wrap=True,
            )


def _quantizing(
    content: dict[str, Any], runs: list[tuple[str, str]], tokens: int, threads: int, json: str | None
) -> None:
    from mq_ao.bench.quantizing import measure_quantizing
    from mq_ao.bench.table import render_quantizing

    costs = []
    for source, recipe in runs:
        with step(f"quantizing {source} ({recipe})"):
            costs.append(measure_quantizing(source, recipe, tokens, threads))
    _write({**content, "quantizing": [cost.to_dict() for cost in costs]}, json)
    if json != "-":
        _print(render_quantizing(costs))


def _write(content: dict[str, Any], json: str | None) -> None:
    if json is not None:
        write_json(json, content)


def _print(parts: Sequence[Table | str]) -> None:
    console = out()
    for part in parts:
        console.print(part)
