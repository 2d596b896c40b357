"""The bundled Vision Mamba's card: what it was trained on, how, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass

from fashion_data import CALIBRATION, SHIPPED, VALIDATION

from mq_ao.models import VimConfig


@dataclass(frozen=True)
class Result:
    """What a training run leaves to be reported; times in seconds, accuracies in [0, 1].

    Attributes:
        test: accuracy on the 10,000 test images, of the finished model alone.
    """

    python: str
    torch: str
    parameters: int
    train: int
    batch: int
    seed: int
    matrix_lr: float
    other_lr: float
    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    validation: float = float("nan")
    test: float = float("nan")


def model_card(config: VimConfig, result: Result) -> str:
    """The text of MODEL_CARD.md."""
    rows = {
        "architecture": f"Vim (bidirectional Mamba-1, version 2), d_model {config.d_model}, {config.n_layer} layers, "
        f"d_state {config.d_state}, patches of {config.patch_size} x {config.patch_size} pixels, "
        f"{result.parameters:,} parameters",
        "accuracy on the 10,000 test images": f"**{result.test:.2%}**",
        f"accuracy on {VALIDATION:,} training images that were not trained on": f"{result.validation:.2%}",
        "steps, images a step, epochs": f"{result.steps:,}, {result.batch}, {result.epochs:.1f}",
        "wall time": f"{result.seconds / 60:.0f} minutes on two CPU cores that others used too",
        "optimiser": f"Muon for the projections (learning rate {result.matrix_lr:g}, weight decay 0.1), "
        f"AdamW for the rest ({result.other_lr:g}); warmup, plateau, linear decay to zero; labels smoothed by 0.1; "
        "images mirrored and moved by up to 2 pixels",
        "arithmetic": "float32 weights, matrix products in bfloat16",
        "seed": str(result.seed),
        "software": f"PyTorch {result.torch}, `examples/train_vim_fashion.py`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Vision demo: Vision Mamba on Fashion-MNIST

A small image classifier, there to try quantization on something real: 28 x 28 grey pixels, ten kinds of clothing.

| | |
|---|---|
{table}

## Data
Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), from Debian's package dataset-fashion-mnist: trained on the first
{result.train:,} of the 60,000 training images. `images.safetensors` holds the first {SHIPPED:,} of the 10,000 test
images with their labels, and the first {CALIBRATION} training images for calibration. No checkpoint was picked by its
score on the test images.

## Licence
Fashion-MNIST is Copyright (c) 2017 Zalando SE, under the MIT licence:

> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
> permit persons to whom the Software is furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or substantial portions of
> the Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

The weights were trained from scratch on these images and are distributed under this project's licence.
"""
