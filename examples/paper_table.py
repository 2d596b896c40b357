"""Fills the language half of MambaQuant's tables: accuracy of recipes on lm-evaluation-harness's tasks.

    python examples/paper_table.py state-spaces/mamba-130m-hf state-spaces/mamba-1.4b-hf \
        --tokenizer EleutherAI/gpt-neox-20b --calibration wiki.txt

Models are hub ids or folders, float32 beside the recipes. What is done is kept in the output folder: programs as they
are made, figures as they are measured. Started again, it goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from paper_figures import FLOAT, RECIPES, Figures, Row, table

from mq_ao import MqAoError, api
from mq_ao.backends import DEFAULT, get_backend
from mq_ao.cli.console import out
from mq_ao.models import demo
from mq_ao.opening import Opened, open_model
from mq_ao.recipes import get_recipe
from mq_ao.text import calibration_batches, read_tokens

TASKS = "arc_easy,arc_challenge,piqa,winogrande,hellaswag,lambada_openai"


def main(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or demo.")],
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text to calibrate on; demo brings its own.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    tokenizer: Annotated[str | None, typer.Option(help="Where models bring none: folder or hub id.")] = None,
    recipes: Annotated[str, typer.Option(help="Names, with commas between.")] = RECIPES,
    tasks: Annotated[str, typer.Option(help="Names, with commas between.")] = TASKS,
    include_path: Annotated[Path | None, typer.Option(exists=True, help="Folder with more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task at most, for trying out.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the programs.")] = DEFAULT.name,
    output: Annotated[Path, typer.Option(help="Folder of programs and figures.")] = Path("paper-table"),
) -> None:
    """Measure every model under every recipe, and print a table."""
    chosen = [get_recipe(name).name for name in recipes.split(",")]
    names = tasks.split(",")
    figures, rows = Figures(output, f"{tasks} {limit}"), {}
    for model in models:
        for recipe in (FLOAT, *chosen):

            def measure(model: str = model, recipe: str = recipe) -> Row:
                source = model
                if recipe != FLOAT:
                    source = str(program(model, tokenizer, recipe, calibration, tokens, backend, output))
                return measured(source, tokenizer, names, include_path, limit)

            rows[model, recipe] = figures.row(model, recipe, measure)
    out().print(table(rows, [*names, "mean"]))


def program(
    model: str,
    tokenizer: str | None,
    recipe: str,
    calibration: Path | None,
    tokens: int,
    backend: str,
    output: Path,
) -> Path:
    """The saved program of a model under a recipe, made where it is not there yet."""
    path = output / f"{Path(model).name}-{recipe}{get_backend(backend).suffix}"
    if path.is_file():
        return path
    if calibration is None and model != "demo":
        raise MqAoError("quantizing needs calibration data: give a text with --calibration FILE.")
    loaded = open_model(model)
    opened = Opened(model, loaded, loaded.config.vocab_size, tokenizer)
    text = read_tokens(calibration or demo.CALIBRATION, opened.vocab_size, opened.needed_codec)
    batches = calibration_batches(text, tokens)
    api.quantize(loaded, batches, recipe, backend=backend, progress=True).lower().save(path)
    return path


def measured(source: str, tokenizer: str | None, tasks: list[str], include_path: Path | None, limit: int | None) -> Row:
    """The accuracy of each task in per cent, and their mean as the paper has it."""
    from mq_ao.integrations.lm_eval import MqAoLM, results

    found = results(MqAoLM(source, tokenizer), tasks, include_path, None, limit)
    # The paper gives accuracy normalised by length where a task has it.
    accuracy = {
        task: 100 * metrics.get("acc_norm", metrics.get("acc", (float("nan"), None)))[0]
        for task, metrics in found.items()
    }
    return {**accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


if __name__ == "__main__":
    try:
        typer.run(main)
    except MqAoError as error:
        raise SystemExit(f"error: {error}") from None
