"""`mq-ao demo`: the whole walk on the bundled model, and what it gained and cost."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.backends import INDUCTOR, NATIVE, Backend, backend_for
from mq_ao.cli.console import bar, err, kernel_counts, megabytes, out, ready_kernels, step
from mq_ao.errors import MqAoError
from mq_ao.files import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from mq_ao.bench.contender import Contender
    from mq_ao.evaluate import Comparison
    from mq_ao.models import MambaLM
    from mq_ao.models.program_interface import LanguageProgram as LoweredProgram

PREFILL_TOKENS = 1024
DECODE_TOKENS = 128
ROUNDS = 7
SAMPLE_TOKENS = 400
PROMPT = "def "
BASELINE = "rtn-w8a8"
_EAGER = "fp32, PyTorch eager"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Program to write: .ptn, or .pt2 for one that Inductor compiles.")
    ] = Path("demo-w8a8.ptn"),
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a recipe file.")] = "mambaquant-w8a8",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    vision: Annotated[
        bool, typer.Option("--vision", help="The bundled image classifier instead, which is not saved.")
    ] = False,
) -> None:
    """Quantize the bundled model, save it, and show what that cost and gained, on text that it has not seen.

    [bold]Examples[/bold]

    mq-ao demo -o demo-w8a8.ptn

    mq-ao demo --vision
    """
    if vision:
        from mq_ao.cli.demo_vision import demo_vision

        demo_vision(recipe)
        return
    backend = backend_for(output, None)
    check_output(output, backend.suffix if backend in (NATIVE, INDUCTOR) else NATIVE.suffix)
    with step("starting"):
        from mq_ao import api
        from mq_ao.evaluate import compare
        from mq_ao.loading import load
        from mq_ao.models import MambaLM
        from mq_ao.models import demo as bundled
        from mq_ao.recipes import get_recipe
        from mq_ao.text import BYTE_VOCABULARY, ByteCodec, calibration_batches, read_tokens
    recipes = [get_recipe(BASELINE), get_recipe(recipe)][int(recipe == BASELINE) :]
    ready_kernels()
    with step("loading the bundled model"):
        model = MambaLM.from_pretrained("demo")
    calibration = read_tokens(bundled.CALIBRATION, BYTE_VOCABULARY, ByteCodec())
    baseline = _baseline()
    with step(f"lowering in fp32, to compare ({baseline.name})"):
        programs = [api.compile_float(model, baseline.name)]
    for chosen in recipes:
        quantized = api.quantize(
            model, calibration_batches(calibration, tokens), chosen, backend=backend.name, progress=True
        )
        with step(f"lowering {chosen.name}"):
            programs.append(quantized.lower())
    err().print(str(quantized.report()), markup=False, highlight=False, soft_wrap=True)
    programs[-1].save(output)
    programs[-1] = load(output)
    text = read_tokens(bundled.HELDOUT, BYTE_VOCABULARY, ByteCodec())
    with bar(f"evaluating {text.predicted} held-out bytes", text.predicted * len(recipes)) as advance:
        comparisons = [compare(programs[0], program, text, progress=advance) for program in programs[1:]]
    backends = [baseline, *[backend] * len(recipes)]
    names = [f"fp32, {baseline.name}", *(f"{item.name}, {backend.name}" for item in recipes)]
    speeds = _measure({_EAGER: model, **dict(zip(names, programs, strict=True))})
    _print_table(comparisons, speeds, programs, backends)
    _print_remarks(comparisons[-1], programs[-1], output)
    _print_sample(programs[-1])


def _baseline() -> Backend:
    """What runs fp32: Inductor, whose float programs decode faster, or native where it would find no compiler."""
    from mq_ao.ops.native.shared_library import compiler

    try:
        compiler()
    except MqAoError:
        return NATIVE
    return INDUCTOR


@dataclass(frozen=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float


def _measure(runs: Mapping[str, MambaLM | LoweredProgram]) -> dict[str, Speed]:
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
    comparisons: Sequence[Comparison],
    speeds: Mapping[str, Speed],
    programs: Sequence[LoweredProgram],
    backends: Sequence[Backend],
) -> None:
    """Eager float32, then the programs: float32, the baseline, the recipe."""
    from rich.table import Table

    table = Table("", title="bundled model, on text that it has not seen", title_justify="left")
    for name in speeds:
        table.add_column(name, justify="right")
    bits = [comparisons[0].reference.bits_per_byte or 0.0, *(item.other.bits_per_byte or 0.0 for item in comparisons)]
    table.add_row("bits per byte", "", *map(_against(bits, "{:.4f}"), bits))
    divergences = [f"{item.divergence:.5f}" for item in comparisons]
    table.add_row("mean KL to fp32, nats", "", "", *divergences)
    sizes = [_file_size(*pair) for pair in zip(programs, backends, strict=True)]
    table.add_row("program file", "", *(f"{megabytes(size)} ({size / sizes[0]:.2f}x)" for size in sizes))
    weights = [program.weight_bytes for program in programs]
    table.add_row("resident weights", "", *(f"{megabytes(size)} ({size / weights[0]:.2f}x)" for size in weights))
    for what in ("prefill", "decode"):
        values = [getattr(speed, what) for speed in speeds.values()]
        table.add_row(f"{what}, tokens/s", *(f"{value:.0f} ({value / values[1]:.2f}x)" for value in values))
    table.add_row("integer kernels", "0", *(str(sum(program.integer_kernels.values())) for program in programs))
    out().print(table)


def _against(values: Sequence[float], form: str) -> Callable[[float], str]:
    """Writes a value, and how far it lies above the first."""
    return lambda value: (
        form.format(value) + ("" if value is values[0] else f" ({100 * (value / values[0] - 1):+.2f} %)")
    )


def _file_size(program: LoweredProgram, backend: Backend) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"program{backend.suffix}"
        program.save(path)
        return path.stat().st_size


def _print_remarks(comparison: Comparison, program: LoweredProgram, output: Path) -> None:
    from mq_ao.evaluate import xz_bits_per_byte
    from mq_ao.models import demo as bundled

    xz = xz_bits_per_byte(bundled.HELDOUT.read_bytes())
    out().print(
        f"xz -9e needs {xz:.4f} bits per byte for the same text. {program.info['recipe']} has the same likeliest byte "
        f"as fp32 for {100 * comparison.agreement:.2f} %. Integer kernels: {kernel_counts(program.integer_kernels)}. "
        f"Saved as {output}.",
        markup=False,
    )


def _print_sample(program: LoweredProgram) -> None:
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
