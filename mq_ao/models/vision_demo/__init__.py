"""The bundled Vim: trained by `examples/train_vim_fashion.py` on Fashion-MNIST, described in MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

FOLDER = Path(__file__).parent
"""Folder with model.safetensors and config.json."""

IMAGES = FOLDER / "images.safetensors"
"""`test_images` uint8 (1000, 28, 28) and `test_labels`: the first of Fashion-MNIST's test set; `calibration_images`
uint8 (256, 28, 28): of its training set."""

MEAN, DEVIATION = 0.2860, 0.3530
"""Of the training pixels, in [0, 1]."""


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (images, 28, 28) -> float32 (images, 1, 28, 28), as the model takes them."""
    return ((pixels.float() / 255 - MEAN) / DEVIATION).unsqueeze(1)
