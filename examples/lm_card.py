"""The card of a model of train_lm.py: what it was trained on, how, and how good it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mq_ao.evaluate import xz_bits_per_byte
from mq_ao.models import Mamba2Config, MambaConfig


@dataclass(frozen=True)
class Result:
    """What a training run leaves to be reported; times in seconds, costs in bits per byte of the held-out text."""

    config: MambaConfig | Mamba2Config
    parameters: int
    python: str
    torch: str
    seed: int
    length: int
    batch: int
    rate: float
    bfloat16: bool
    stable_steps: int
    cooldown_steps: int
    text_tokens: int
    seconds: float
    heldout_bpb: float
    heldout_perplexity: float
    sample: str


def _shape(config: MambaConfig | Mamba2Config) -> str:
    ours = f"d_model {config.d_model}, {config.n_layer} layers, d_state {config.d_state}, d_conv {config.d_conv}, "
    if isinstance(config, Mamba2Config):
        return f"Mamba-2, {ours}headdim {config.headdim}, expand {config.expand}, tied head"
    return f"Mamba-1, {ours}expand {config.expand}, tied head"


def model_card(result: Result, corpus: Path) -> str:
    """The text of MODEL_CARD.md, of a model trained on the text in `corpus`."""
    sources = json.loads((corpus / "sources.json").read_text())
    heldout = (corpus / "heldout.txt").read_bytes()
    steps = result.stable_steps + result.cooldown_steps
    seen = steps * result.batch * result.length
    rows = {
        "architecture": _shape(result.config),
        "parameters": f"{result.parameters:,}, stored in bfloat16",
        "tokens": f"byte pairs, {result.config.vocab_size:,}",
        "held-out text": f"**{result.heldout_bpb:.4f} bits per byte**, "
        f"perplexity {result.heldout_perplexity:.2f} a token",
        "`xz -9e` on the same bytes, in one piece": f"{xz_bits_per_byte(heldout):.4f} bits per byte",
        "steps, windows a step, tokens a window": f"{steps:,}, {result.batch}, {result.length}",
        "tokens seen": f"{seen:,}, {seen / result.text_tokens:.2f} epochs",
        "wall time": f"{result.seconds / 3600:.1f} hours on two CPU cores that others used too",
        "optimiser": f"AdamW, learning rate {result.rate:g}, betas 0.9 and 0.99, weight decay 0.1 on the projections; "
        + (
            f"warmup, constant, and {result.cooldown_steps:,} steps of linear decay to zero"
            if result.cooldown_steps
            else "warmup, then constant: this model is an intermediate one, whose rate has not decayed"
        ),
        "arithmetic": "bfloat16 by autocast, weights in float32" if result.bfloat16 else "float32",
        "seed": str(result.seed),
        "software": f"PyTorch {result.torch}, Python {result.python}, `examples/train_lm.py`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    texts = "\n".join(
        f"| {source['name']} | {source['version']} | {source['documents']['train']:,} | {source['bytes']['train']:,} | "
        f"{source['bytes']['heldout']:,} | {source['licence']} |"
        for source in sources
    )
    return f"""# {"Mamba-2" if isinstance(result.config, Mamba2Config) else "Mamba"} on documentation and Python

A small language model, there to try quantization on something real. Token 0, `<|endoftext|>`, separates documents and
begins each of them. It writes text that looks like documentation; do not expect it to be right.

| | |
|---|---|
{table}

## Data
Documentation packages of Debian's section main and Python packages, all under permissive licences
(`examples/text_corpus.py`).
`heldout.txt` and `calibration.txt` are whole documents that were not trained on, chosen by a hash of their names.

| source | version | training documents | training bytes | held-out bytes | licence |
|---|---|---|---|---|---|
{texts}

The texts are their authors' and under the licences above. The weights were trained from scratch on them and are
distributed under this project's licence.

## Sample
Temperature 0.7, top-p 0.95, after "The function".

```
{result.sample}
```
"""
