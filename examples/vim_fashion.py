"""Quantizes the bundled Vision Mamba, recipe by recipe, and classifies Fashion-MNIST's test images in integers.

The 256 calibration images that ship with the model calibrate; they are training images. The integer operators run one
by one, as in a compiled program, so that recipes are compared without compiling each.

Examples:

    sudo apt install dataset-fashion-mnist

    python examples/vim_fashion.py

    python examples/vim_fashion.py --bits 8 --limit 1000 --json vim.json

    python examples/vim_fashion.py --model runs/vim/vision_demo

    python examples/vim_fashion.py --recipe rtn-w4a4 --recipe mambaquant-w4a4
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from fashion_data import FOLDER, read
from recipe_table import measure, named, report
from safetensors.torch import load_file
from torch import Tensor

from mq_ao.ablation.steps import BASELINES, PRODUCTION, parse_bits
from mq_ao.cli.console import check_json
from mq_ao.errors import MqAoError
from mq_ao.lowering import inductor
from mq_ao.models import Vim, vision_demo
from mq_ao.models.vision_demo import normalised
from mq_ao.quantized import QuantizedModel
from mq_ao.recipes import get_recipe

BATCH = 64


def in_integers(quantized: QuantizedModel) -> Callable[[Tensor], Tensor]:
    """The graph over integer operators.

    Raises:
        MqAoError: something quantized in it has no integer kernel.
    """
    graph = inductor.rewrite(quantized.converted)
    if graph.simulated:
        raise MqAoError(f"{', '.join(graph.simulated)} would be simulated in float: leave the recipe out.")
    return graph.module


def main(
    model: Annotated[str, typer.Option(help='Folder of a trained Vim, or "demo", the bundled one.')] = "demo",
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = FOLDER,
    bits: Annotated[str, typer.Option(help="Widths of the weights.")] = "8,4",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Name or file of a recipe; given once or more, only these are measured.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images to evaluate on; all by default.")] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")
    ] = None,
) -> None:
    """Accuracy, agreement with float32 and mean KL to it, of every recipe, in integers."""
    check_json(json)
    families = (*BASELINES, "mambaquant-static", PRODUCTION)
    table = [(width, get_recipe(f"{family}-w{width}a8")) for width in parse_bits(bits) for family in families]
    chosen = named(recipe) if recipe else table
    test = read(data, "t10k")
    test = test.part(0, limit or len(test))
    vim = Vim.from_pretrained(model)
    shipped = load_file((vision_demo.FOLDER if model == "demo" else Path(model)) / vision_demo.IMAGES.name)
    calibration = [(batch,) for batch in normalised(shipped["calibration_images"]).split(BATCH)]
    report(measure(vim, calibration, chosen, normalised(test.pixels), test.labels, in_integers), json)


if __name__ == "__main__":
    typer.run(main)
