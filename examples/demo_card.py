"""The demo model's card: what it was trained on, how, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass

from demo_corpus import CALIBRATION, HELD_OUT

from mq_ao.models import MambaConfig


@dataclass(frozen=True)
class Result:
    """What a training run leaves to be reported; sizes in bytes, times in seconds, costs in bits per byte.

    Attributes:
        heldout_repeated: share of the held-out bytes in lines of 30 characters or more that are in training.
        xz_bpb: `xz -9e` on the held-out text in one piece.
    """

    python: str
    torch: str
    train_documents: int
    train_bytes: int
    module_documents: int
    module_bytes: int
    heldout_repeated: float
    xz_bpb: float
    seed: int
    length: int
    batch: int
    matrix_lr: float
    other_lr: float
    steps: int = 0
    bytes_seen: int = 0
    seconds: float = 0.0
    heldout_bpb: float = float("nan")
    sample: str = ""


def model_card(config: MambaConfig, result: Result) -> str:
    """The text of MODEL_CARD.md."""
    rows = {
        "architecture": f"Mamba-1, d_model {config.d_model}, {config.n_layer} layers, "
        f"d_state {config.d_state}, d_conv {config.d_conv}, expand {config.expand}, tied head",
        "held-out text": f"**{result.heldout_bpb:.4f} bits per byte**",
        "`xz -9e` on the same bytes, in one piece": f"{result.xz_bpb:.4f} bits per byte",
        "steps, windows a step, bytes a window": f"{result.steps:,}, {result.batch}, {result.length}",
        "bytes seen": f"{result.bytes_seen:,}",
        "wall time": f"{result.seconds / 60:.0f} minutes on two CPU cores that others used too",
        "optimiser": f"Muon for the projections (learning rate {result.matrix_lr:g}, weight decay 0.1), "
        f"AdamW for the rest ({result.other_lr:g}); warmup, plateau, linear decay to zero",
        "arithmetic": "float32 weights, matrix products in bfloat16",
        "seed": str(result.seed),
        "software": f"PyTorch {result.torch}, `examples/train_demo_lm.py`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""# Demo model: byte-level Mamba on Python's standard library

A small language model, there to try quantization on something real. One token is one byte (vocabulary 256);
a 0 byte separates documents and begins each of them. It completes Python that looks like the standard
library; do not expect the code to be right.

| | |
|---|---|
{table}

## Data
The `.py` files of the standard library of CPython {result.python}: {result.train_documents:,} documents,
{result.train_bytes:,} bytes; in the last part of the run only the {result.module_documents:,} that are no
tests and no tables ({result.module_bytes:,} bytes).

Kept out of training, with their tests: {_listed(HELD_OUT)}.
These modules are `heldout.txt`. Of its bytes, {result.heldout_repeated:.1%} are in lines of 30 characters
or more that the training text has too (licence lines, common idioms).

`calibration.txt` is from the training text: {_listed(CALIBRATION)}.

## Licence
The texts are part of CPython: Copyright (c) 2001 Python Software Foundation; All Rights Reserved. They are
distributed under the Python Software Foundation License Version 2, https://docs.python.org/3/license.html.
The weights were trained from scratch on them and are distributed under this project's licence.
"""
    if result.sample:
        text += "\n## Sample\nTemperature 0.7, top-p 0.95, at the start of a document.\n\n"
        text += f"```\n{result.sample}\n```\n"
    return text


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
