"""Writing models to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from mq_ao.files import write_atomically

if TYPE_CHECKING:
    from mq_ao.models.mamba import MambaLM

MODEL_TYPE = "mq_ao.mamba"
"""`model_type` in the config.json of our own layout."""


def save_pretrained(model: MambaLM, folder: str | Path) -> None:
    """Writes model.safetensors (names of mamba_ssm, tied head left out) and config.json into `folder`.

    The configuration is written last: a folder with a config.json is complete.

    Raises:
        MqAoError: the folder cannot be written.
    """
    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    config: dict[str, Any] = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
