"""`mq-ao demo`: the whole walk on the bundled model, and what it gained and cost."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.cli.console import bar, err, kernel_counts, megabytes, out, ready_kernels, step
from mq_ao.files import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from mq_ao.bench.contender import Contender
    from mq_ao.evaluate import Comparison
    from mq_ao.lowering.inductor import InductorProgram
    from mq_ao.models import MambaLM

PREFILL_TOKENS = 1024
DECODE_TOKENS = 128
ROUNDS = 7
SAMPLE_TOKENS = 400
PROMPT = "def "


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Program to write, ending in .pt2.")] = Path(
        "demo-w8a8.pt2"
    ),
    recipe: Annotated[str, typer.Option(help="How to quantize, see mq_ao.recipes.")] = "rtn-w8a8",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
) -> None:
    """Quantize the bundled model, save it, and show what that cost and gained, on text that it has not seen.

    [bold]Example[/bold]

    mq-ao demo -o demo-w8a8.pt2
    """
    check_output(output, ".pt2")
    with step("starting"):
        from mq_ao import api
        from mq_ao.evaluate import compare
        from mq_ao.models import MambaLM
        from mq_ao.models import demo as bundled
        from mq_ao.recipes import get_recipe
        from mq_ao.text import BYTE_VOCABULARY, ByteCodec, calibration_batches, read_tokens
    chosen = get_recipe(recipe)
    ready_kernels()
    with step("loading the bundled model"):
        model = MambaLM.from_pretrained("demo")
    calibration = read_tokens(bundled.CALIBRATION, BYTE_VOCABULARY, ByteCodec())
    quantized = api.quantize(model, calibration_batches(calibration, tokens), chosen, progress=True)
    err().print(str(quantized.report()), markup=False, highlight=False, soft_wrap=True)
    with step("compiling in int8"):
        quantized.lower("inductor").save(output)
        program = api.load(output)
    with step("compiling in fp32, to compare"):
        compiled = api.compile_float(model)
    text = read_tokens(bundled.HELDOUT, BYTE_VOCABULARY, ByteCodec())
    with bar(f"evaluating {text.predicted} held-out bytes", text.predicted) as advance:
        comparison = compare(compiled, program, text, progress=advance)
    speeds = _measure({"eager": model, "compiled": compiled, "int8": program})
    _print_table(comparison, speeds, (compiled, program), output)
    _print_sample(program)


@dataclass(frozen=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float


def _measure(runs: Mapping[str, MambaLM | InductorProgram]) -> dict[str, Speed]:
    """Medians over rounds in which all take turns."""
    import torch

    from mq_ao.bench.contender import Eager, Program
    from mq_ao.bench.prepare import random_ids
    from mq_ao.models import MambaLM
    from mq_ao.text import BYTE_VOCABULARY

    contenders: dict[str, Contender] = {
        name: Eager(run) if isinstance(run, MambaLM) else Program(run) for name, run in runs.items()
    }
    ids = torch.tensor([random_ids(BYTE_VOCABULARY, PREFILL_TOKENS)])
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    decode: dict[str, list[float]] = {name: [] for name in runs}
    with bar("timing", ROUNDS * len(runs)) as advance, torch.no_grad():
        for _ in range(ROUNDS):
            for name, contender in contenders.items():
                prefill[name].append(_seconds(contender.prefill, ids))
                decode[name].append(_seconds(contender.decode, ids[:, :DECODE_TOKENS]))
                advance()
    return {
        name: Speed(PREFILL_TOKENS / statistics.median(prefill[name]), DECODE_TOKENS / statistics.median(decode[name]))
        for name in runs
    }


def _seconds(run: Callable[[Tensor], object], ids: Tensor) -> float:
    started = time.perf_counter()
    run(ids)
    return time.perf_counter() - started


def _print_table(
    comparison: Comparison,
    speeds: Mapping[str, Speed],
    programs: tuple[InductorProgram, InductorProgram],
    output: Path,
) -> None:
    from rich.table import Table

    from mq_ao.evaluate import xz_bits_per_byte
    from mq_ao.models import demo as bundled

    compiled, program = programs
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "fp32.pt2")
        sizes = (Path(folder) / "fp32.pt2").stat().st_size, output.stat().st_size
    bits = comparison.reference.bits_per_byte or 0.0, comparison.other.bits_per_byte or 0.0
    eager, fp32, int8 = speeds["eager"], speeds["compiled"], speeds["int8"]
    table = Table("", title=f"bundled model, {program.info['recipe']}", title_justify="left")
    for name in ("fp32, PyTorch eager", "fp32, compiled", "int8, compiled", "int8 against compiled fp32"):
        table.add_column(name, justify="right")
    table.add_row(
        "bits per byte, held-out text",
        "",
        f"{bits[0]:.4f}",
        f"{bits[1]:.4f}",
        f"{100 * (bits[1] / bits[0] - 1):+.2f} %",
    )
    table.add_row("program file", "", *map(megabytes, sizes), f"{sizes[1] / sizes[0]:.2f}x")
    weights = compiled.weight_bytes, program.weight_bytes
    table.add_row("resident weights", "", *map(megabytes, weights), f"{weights[1] / weights[0]:.2f}x")
    for name in ("prefill", "decode"):
        values = [getattr(row, name) for row in (eager, fp32, int8)]
        table.add_row(f"{name}, tokens/s", *(f"{value:.0f}" for value in values), f"{values[2] / values[1]:.2f}x")
    kernels = sum(program.integer_kernels.values())
    table.add_row("integer kernels", "0", str(sum(compiled.integer_kernels.values())), str(kernels), "")
    console = out()
    console.print(table)
    xz = xz_bits_per_byte(bundled.HELDOUT.read_bytes())
    console.print(
        f"xz -9e needs {xz:.4f} bits per byte for the same text. int8 has the same likeliest byte as fp32 for "
        f"{100 * comparison.agreement:.2f} %. Integer kernels: {kernel_counts(program.integer_kernels)}. "
        f"Saved as {output}.",
        markup=False,
    )


def _print_sample(program: InductorProgram) -> None:
    import torch

    from mq_ao.models import Sampling
    from mq_ao.text import ByteCodec

    codec = ByteCodec()
    ids = torch.tensor(codec.documents(PROMPT.encode()))
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=1)
    tokens = (int(token) for token in program.stream(ids, SAMPLE_TOKENS, sampling))
    console = out()
    console.rule(f"int8 sample after {PROMPT!r}")
    print(PROMPT + "".join(codec.pieces(tokens)))
    console.rule()
