"""The bundled Vim: trained by `examples/train_vim_fashion.py` on Fashion-MNIST, described in MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder with model.safetensors and config.json."""

IMAGES = FOLDER / "images.safetensors"
"""`test_images` uint8 (1000, 28, 28) and `test_labels`: the first of Fashion-MNIST's test set; `calibration_images`
uint8 (256, 28, 28): of its training set."""
