"""Quantizes a trained Mamba that classifies MNIST images as sequences of 784 pixels, recipe by recipe.

FOLDER holds model.safetensors (Linear, Mamba-1 blocks in sequence without residual, mean over time, LayerNorm, Linear;
upstream parameter names) and one .npz with `images` uint8 (images, 784) and `labels` uint8. The first 512 images
calibrate, the others evaluate. Everything runs in simulated integers.

Examples:

    python examples/mnist_mamba.py ../shared/golden/mnist-mamba

    python examples/mnist_mamba.py ../shared/golden/mnist-mamba --bits 8 --limit 1000 --json mnist.json

    python examples/mnist_mamba.py ../shared/golden/mnist-mamba --recipe rtn-w4a4 --recipe mambaquant-w4a4
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy
import torch
import typer
from recipe_table import measure, named, report
from safetensors.torch import load_file
from torch import Tensor, nn

from mq_ao.ablation.steps import BASELINES, CHAIN, PRODUCTION, canonical, parse_bits, scheme
from mq_ao.cli.console import check_json
from mq_ao.models import MambaConfig
from mq_ao.models.mamba import MambaMixer
from mq_ao.passes.rotate_dt import RotateDt
from mq_ao.passes.rotate_out_proj import RotateOutProj
from mq_ao.passes.smooth_gate import SmoothGate
from mq_ao.quantizer import RoleSpec
from mq_ao.recipes import Recipe, get_recipe

CALIBRATION_IMAGES = 512
BATCH = 64
MEAN, DEVIATION = 0.1307, 0.3081
"""Of MNIST's training pixels, as the model was trained."""


class MnistMamba(nn.Module):
    """The classifier; parameters have their upstream names.

    Args:
        config: shape of the blocks; its vocabulary is not used.
        classes: outputs of the classifier.
    """

    def __init__(self, config: MambaConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(1, config.d_model)
        self.layers = nn.ModuleList(MambaMixer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_epsilon)
        self.classifier = nn.Linear(config.d_model, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, length, 1), normalised -> logits (batch, classes)."""
        c, batch = self.config, pixels.shape[0]
        conv_state = pixels.new_zeros(batch, c.d_conv - 1, c.d_inner)
        ssm_state = pixels.new_zeros(batch, c.d_inner, c.d_state)
        hidden = self.input_proj(pixels)
        for layer in self.layers:
            hidden, _, _ = layer(hidden, conv_state, ssm_state)
        return self.classifier(self.norm(hidden.mean(1)))


def load_model(folder: Path) -> MnistMamba:
    """Loads FOLDER/model.safetensors, in eval mode; its shapes give the configuration."""
    weights = load_file(folder / "model.safetensors")
    d_inner, d_state = weights["layers.0.A_log"].shape
    classes, d_model = weights["classifier.weight"].shape
    config = MambaConfig(
        vocab_size=1,
        d_model=d_model,
        n_layer=sum(name.endswith(".A_log") for name in weights),
        d_state=d_state,
        d_conv=weights["layers.0.conv1d.weight"].shape[-1],
        expand=d_inner // d_model,
        dt_rank=weights["layers.0.dt_proj.weight"].shape[1],
    )
    model = MnistMamba(config, classes)
    model.load_state_dict(weights)
    return model.eval()


def load_data(folder: Path) -> tuple[Tensor, Tensor]:
    """The images of FOLDER's .npz file, (images, 784, 1) float32, normalised; and the labels (images,) int64."""
    (path,) = folder.glob("*.npz")
    with numpy.load(path) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    return ((images.float() / 255 - MEAN) / DEVIATION)[..., None], labels.long()


def calibration_batches(images: Tensor) -> list[tuple[Tensor]]:
    """The first images, as positional inputs of the model."""
    return [(batch,) for batch in images[:CALIBRATION_IMAGES].split(BATCH)]


def static_recipes(bits: int) -> list[Recipe]:
    """Static ones with scan operands in int8: without rewrites, with a prototype's, and with all of them.

    The prototype's figures are in docs/method.md, section 8.
    """
    scan = scheme(bits)
    chain = canonical(item for _, added in CHAIN for item in added)
    return [
        Recipe("static, scan", scan),
        Recipe("static S2 R2 R5, scan", scan, canonical((SmoothGate(), RotateDt(), RotateOutProj()))),
        Recipe("static, every transform, scan", scan, chain),
        Recipe("static, every transform, scan and gate", scan.replaced(gate=RoleSpec()), chain),
        get_recipe(f"mambaquant-static-w{bits}a8"),
    ]


def recipes(bits: int) -> list[Recipe]:
    """What is compared, the production recipe last."""

    def of(family: str) -> Recipe:
        return get_recipe(f"{family}-w{bits}a8")

    return [*map(of, (*BASELINES, "mambaquant-paper")), *static_recipes(bits), of(PRODUCTION)]


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Holds model.safetensors and a .npz.")],
    bits: Annotated[str, typer.Option(help="Widths of the weights.")] = "8,4",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Name or file of a recipe; given once or more, only these are measured.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images to evaluate on; all by default.")] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")
    ] = None,
) -> None:
    """Accuracy, agreement with float32 and mean KL to it, of every recipe."""
    check_json(json)
    table = [(width, item) for width in parse_bits(bits) for item in recipes(width)]
    chosen = named(recipe) if recipe else table
    model = load_model(folder)
    images, labels = load_data(folder)
    calibration = calibration_batches(images)
    images, labels = (part[CALIBRATION_IMAGES:][:limit] for part in (images, labels))
    results = measure(model, calibration, chosen, images, labels, lambda quantized: quantized.converted)
    report(results, json)


if __name__ == "__main__":
    typer.run(main)
