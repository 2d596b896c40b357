"""`mq-ao quantize`: a float model becomes a saved integer program."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mq_ao.backends import CUDA, EXECUTORCH, NATIVE, Backend, backend_for
from mq_ao.cli import budget as searching
from mq_ao.cli.console import err, kernel_counts, megabytes, out, step
from mq_ao.cli.opened import MODEL_HELP, TOKENIZER_HELP, CalibrationFile, Opened, open_model
from mq_ao.errors import MqAoError
from mq_ao.files import check_output, write_atomically


class Format(StrEnum):
    """What is written."""

    PROGRAM = "program"
    COMPRESSED = "compressed-tensors"


if TYPE_CHECKING:
    from mq_ao.lowering.executorch import Options


def quantize(
    *,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Program to write: .ptn for native, .pt2 for inductor, .pte for executorch, .ptc for cuda; or a "
            "folder, see --format.",
        ),
    ],
    calibration: CalibrationFile = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a recipe, or a recipe file (.yaml, .json). Default: mambaquant-w8a8; with --budget "
            "mambaquant-w4a8."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="LIMIT",
            help="Choose the precision of every linear for a limit: 'size<=0.20' (share of the float32 weights) or "
            "'loss<=0.5%' (of bits per byte, on calibration text).",
        ),
    ] = None,
    save_recipe: Annotated[Path | None, typer.Option(help="Recipe file to write with what was done (.yaml).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="--budget: plot of size and divergence to write (.png, .svg).")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="--budget: keeps what is measured; a run that was cut off goes on."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens, spread evenly over the file.")] = 16384,
    backend: Annotated[
        str | None,
        typer.Option(
            help="native: a CPU, without compiling; inductor: this machine's CPU; executorch: a .pte for edge devices; "
            "cuda: GPUs. Default: what the output's name says."
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="executorch: tokens that prefill takes at most in one call.")] = 256,
    max_context: Annotated[
        int, typer.Option(help="executorch: tokens of a conversation, of models with attention.")
    ] = 2048,
    scan: Annotated[
        str, typer.Option(help="executorch: native (our operators) or portable (any runtime, float, slow).")
    ] = "native",
    runner: Annotated[
        bool, typer.Option("--runner", help="executorch: also what ExecuTorch's LLM runner calls, for its apps.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="program, or compressed-tensors: a folder for vLLM and transformers, by their kernels (w8a8 or w4a16)."
        ),
    ] = Format.PROGRAM,
    report: Annotated[Path | None, typer.Option(help="Page to write with what was done, ending in .html.")] = None,
) -> None:
    """Calibrate and quantize a model, and save the program that runs it.

    [bold]Examples[/bold]

    mq-ao quantize demo -o demo-w8a8.ptn

    mq-ao quantize state-spaces/mamba-130m-hf --calibration wiki.txt --tokens 32768 -o mamba-w8a8.ptn

    mq-ao quantize ./my-mamba --calibration ids.npy --recipe mine.yaml -o mine.ptn

    mq-ao quantize demo --budget 'size<=0.19' --save-recipe mixed.yaml --plot mixed.svg -o mixed.ptn

    mq-ao quantize demo -o compiled.pt2

    mq-ao quantize demo -o demo.pte

    mq-ao quantize ./my-mamba --calibration wiki.txt --runner -o for-the-app.pte

    mq-ao quantize demo -o demo.ptc

    mq-ao quantize ./my-bamba --calibration wiki.txt --format compressed-tensors -o my-bamba-w8a8
    """
    if format is Format.COMPRESSED:
        if any(given is not None for given in (budget, save_recipe, plot, resume)):
            raise MqAoError("this format has recipes of its own: leave out --budget and what goes with it.")
        _compressed(model, output, calibration, recipe or "mambaquant-w8a8", tokens, tokenizer)
        return
    runs = backend_for(output, backend)
    check_output(output, runs.suffix)
    if save_recipe is not None:
        check_output(save_recipe, ".yaml")
    if report is not None:
        check_output(report, ".html")
    with step("starting"):
        from mq_ao import api
        from mq_ao.models import demo
        from mq_ao.recipe_files import to_yaml
        from mq_ao.recipes import get_recipe
        from mq_ao.text import TOKEN_FILES, calibration_batches, read_tokens
        from mq_ao.tokenizer import is_beside

        if report is not None:
            import_module("mq_ao.report.page")  # before anything takes long: it says what it lacks
    searching.check_options(budget, runs is NATIVE, plot, resume)
    chosen = get_recipe(recipe or ("mambaquant-w8a8" if budget is None else "mambaquant-w4a8"))
    options = _options(runs, max_length, max_context, scan, runner)
    data = _calibration(calibration, demo.CALIBRATION if model == "demo" else None)
    loaded = open_model(model)
    opened = Opened(model, loaded, loaded.config.vocab_size, tokenizer)
    codec = None if data.suffix in TOKEN_FILES else opened.codec
    text = read_tokens(data, opened.vocab_size, codec)
    named = tokenizer or (model if is_beside(model) else None)
    if budget is None:
        batches = calibration_batches(text, tokens)
        quantized = api.quantize(loaded, batches, chosen, backend=runs.name, tokenizer=named, progress=True)
    else:
        quantized = searching.search(loaded, text, tokens, budget, chosen, named, plot=plot, resume=resume)
    if save_recipe is not None:
        write_atomically(save_recipe, to_yaml(quantized.report().recipe).encode())
    err().print(str(quantized.report()), markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        with step("writing the report"):
            quantized.report(html=report, title=model)
    with step(f"lowering ({runs.name})"):
        program = quantized.lower(options=options)
    program.save(output)
    counts = kernel_counts(program.integer_kernels)
    out().print(
        f"{output}: {megabytes(output.stat().st_size)}, integer kernels: {counts}",
        markup=False,
        soft_wrap=True,
    )
    if runs is CUDA:
        out().print(
            "lowered on the CPU, and not run on a GPU: the machine that loads it compiles it. Here it runs by the "
            "operators' references, for checking."
        )
    share = program.weight_bytes / opened.weight_bytes
    out().print(f"resident weights {megabytes(program.weight_bytes)}, {share:.3f} of float32")


def _compressed(
    model: str, folder: Path, calibration: Path | None, recipe: str, tokens: int, tokenizer: str | None
) -> None:
    """Writes a folder of the compressed-tensors format."""
    calibration = _calibration(calibration)
    if folder.is_dir() and any(folder.iterdir()):
        raise MqAoError(f"{folder} is a folder that is not empty: name a new one.")
    with step("starting"):
        from mq_ao import tokenizer as tokenizers
        from mq_ao.integrations import compressed_tensors
        from mq_ao.models.loading import find
        from mq_ao.models.transformers_loading import load_folder
        from mq_ao.text import calibration as batches_of
    scheme = recipe.rpartition("-")[2]
    with step(f"loading {model}"):
        source = find(model)
        loaded = load_folder(source)
    batches = batches_of(calibration, tokenizer or loaded, tokens=tokens)
    in_float = compressed_tensors.save_pretrained(loaded, folder, batches, scheme, progress=True)
    if tokenizers.is_beside(tokenizer or source):
        for name, text in tokenizers.files(tokenizer or source).items():
            write_atomically(folder / name, text.encode())
    used = compressed_tensors.RECIPES[compressed_tensors.Scheme(scheme)].name
    out().print(
        f"{folder}: {used} instead of {recipe}, which has parts that this format cannot hold: norms and the rotation "
        f"of the residual stream are folded in. In float: {', '.join(in_float)}",
        markup=False,
        soft_wrap=True,
    )


def _calibration(given: Path | None, default: Path | None = None) -> Path:
    found = given or default
    if found is None:
        raise MqAoError("quantizing needs calibration data: give text or token ids with --calibration FILE.")
    return found


def _options(runs: Backend, max_length: int, max_context: int, scan: str, runner: bool) -> Options | None:
    if runs is not EXECUTORCH:
        return None
    from mq_ao.checks import member
    from mq_ao.lowering.executorch.options import Options, Scan

    return Options(max_length=max_length, max_context=max_context, scan=member(scan, "scan", Scan), runner=runner)
