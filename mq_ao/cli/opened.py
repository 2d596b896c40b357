"""A model named on the command line, opened with a line for everything that takes long."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao import opening
from mq_ao.cli.console import step
from mq_ao.opening import MODEL_HELP, Opened, is_program

if TYPE_CHECKING:
    from mq_ao.models import Logits, MambaLM

__all__ = [
    "ANY_HELP",
    "MODEL_HELP",
    "TEXT_FILE",
    "TOKENIZER_HELP",
    "CalibrationFile",
    "Opened",
    "is_program",
    "open_any",
    "open_float",
    "open_model",
]

ANY_HELP = f"A saved .pt2, .ptn, .pte or .ptc program, {MODEL_HELP}"
TOKENIZER_HELP = "Folder or hub id of the tokenizer, where the model is not byte-level and brings none."
TEXT_FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "readable": True}
"""What a file of text must be."""
CalibrationFile = Annotated[
    Path | None,
    typer.Option(**TEXT_FILE, help="Text, or token ids (.npy, .safetensors). Default for demo: the bundled text."),
]


def open_float(source: str) -> MambaLM:
    """See `opening.open_float`."""
    return opening.open_float(source, step)


def open_model(source: str) -> MambaLM | Logits:
    """See `opening.open_model`."""
    return opening.open_model(source, step)


def open_any(source: str, tokenizer: str | None = None, *, states: bool = False) -> Opened:
    """See `opening.open_any`."""
    return opening.open_any(source, tokenizer, states=states, step=step)
