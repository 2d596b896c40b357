"""Fills the vision half of MambaQuant's tables: accuracy of recipes for Vision Mamba on ImageNet.

    python examples/paper_table_vision.py vim_tiny.pth vim_small.pth vim_base.pth \
        --images imagenet/val --calibration imagenet/train

Both folders have a folder for each class. The integer operators run one by one, as in a compiled program. Figures are
kept in the output folder as they are measured; started again, it goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from image_folder import ImageFolder
from paper_figures import FLOAT, RECIPES, Figures, Row, table
from torch import nn
from vim_fashion import in_integers

from mq_ao import MqAoError, api
from mq_ao.cli.console import bar, out
from mq_ao.models import Vim
from mq_ao.recipes import get_recipe


def main(
    models: Annotated[list[str], typer.Argument(help="Public checkpoint files, folders, or demo.")],
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Images to evaluate on.")],
    calibration: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Others, to calibrate on.")],
    count: Annotated[int, typer.Option(min=1, help="Images to calibrate on.")] = 256,
    image_size: Annotated[int | None, typer.Option(help="Pixels of a side, of public checkpoints.")] = None,
    stride: Annotated[int | None, typer.Option(help="Of public checkpoints fine-tuned on long sequences: 8.")] = None,
    recipes: Annotated[str, typer.Option(help="Names, with commas between.")] = RECIPES,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Images to evaluate on at most.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of figures.")] = Path("paper-table"),
) -> None:
    """Measure every model under every recipe, and print a table."""
    chosen = [get_recipe(name).name for name in recipes.split(",")]
    if images.resolve() == calibration.resolve():
        raise MqAoError("--images and --calibration are one folder: calibrate on training images.")
    shape = {name: value for name, value in (("image_size", image_size), ("stride", stride)) if value is not None}
    figures, rows = Figures(output, f"{images.resolve()} {limit} {shape}"), {}
    wanted, known = ImageFolder(images, limit), ImageFolder(calibration, count)
    for name in models:
        model = Vim.from_pretrained(name, **shape)
        if (classes := model.config.num_classes) != wanted.classes:
            raise MqAoError(
                f"{name} tells {classes} classes, and {images} has {wanted.classes}: they do not go together."
            )
        for recipe in (FLOAT, *chosen):

            def measure(model: Vim = model, recipe: str = recipe) -> Row:
                side = model.config.image_size
                run: nn.Module = model
                if recipe != FLOAT:
                    inputs = [(pixels,) for pixels, _ in known.batches(side, batch)]
                    run = in_integers(api.quantize(model, inputs, recipe, progress=True))
                return {"top-1 accuracy, %": accuracy(run, wanted, side, batch)}

            rows[name, recipe] = figures.row(name, recipe, measure)
    out().print(table(rows, ["top-1 accuracy, %"]))


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageFolder, side: int, batch: int) -> float:
    """Images that are classified right, in per cent."""
    right = 0
    with bar("classifying", len(images)) as advance:
        for pixels, labels in images.batches(side, batch):
            right += int((model(pixels).argmax(-1) == labels).sum())
            advance(len(labels))
    return 100 * right / len(images)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MqAoError as error:
        raise SystemExit(f"error: {error}") from None
