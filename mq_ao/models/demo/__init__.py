"""The bundled byte-level model: trained by `examples/train_demo_lm.py`, described in MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder with model.safetensors and config.json."""

HELDOUT = FOLDER / "heldout.txt"
"""About 200 kB of Python source that the model was not trained on; documents separated by a 0 byte."""

CALIBRATION = FOLDER / "calibration.txt"
"""About 64 kB of the training text, disjoint from `HELDOUT`; documents separated by a 0 byte."""
