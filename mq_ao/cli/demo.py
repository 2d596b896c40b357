"""`mq-ao demo`: the whole walk on the bundled model, and what it gained and cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.cli.console import bar, check_output, err, megabytes, out, step

if TYPE_CHECKING:
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
        from mq_ao.models import MambaLM
        from mq_ao.models import demo as bundled
        from mq_ao.recipes import get_recipe
        from mq_ao.text import BYTE_VOCABULARY, ByteCodec, calibration_batches, read_tokens
    chosen = get_recipe(recipe)
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
    _report(model, compiled, program, output)


def _report(model: MambaLM, compiled: InductorProgram, program: InductorProgram, output: Path) -> None:
    from mq_ao.evaluate import compare
    from mq_ao.models import demo as bundled
    from mq_ao.text import BYTE_VOCABULARY, ByteCodec, read_tokens

    text = read_tokens(bundled.HELDOUT, BYTE_VOCABULARY, ByteCodec())
    with bar(f"evaluating {text.predicted} held-out bytes", text.predicted) as advance:
        comparison = compare(compiled, program, text, progress=advance)
    speeds = _speeds({"eager": model, "compiled": compiled, "int8": program})
    _print_table(comparison, speeds, compiled, program, output)
    _print_sample(program)


@dataclass(frozen=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float


def _speeds(runs: Mapping[str, MambaLM | InductorProgram]) -> dict[str, Speed]:
    """Medians over rounds in which all take turns."""
    import torch

    from mq_ao.bench.contender import Contender, Eager, Program
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
                prefill[name].append(_seconds(lambda it=contender: it.prefill(ids)))
                decode[name].append(_seconds(lambda it=contender: it.decode(ids[:, :DECODE_TOKENS])))
                advance()
    return {
        name: Speed(PREFILL_TOKENS / statistics.median(prefill[name]), DECODE_TOKENS / statistics.median(decode[name]))
        for name in runs
    }
