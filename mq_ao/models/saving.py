"""Writing models to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from mq_ao.files import write_atomically

if TYPE_CHECKING:
    from mq_ao.models.mamba import MambaLM
    from mq_ao.models.mamba_nd import MambaND
    from mq_ao.models.vim import Vim


def save_pretrained(model: MambaLM | MambaND | Vim, folder: str | Path) -> None:
    """Writes model.safetensors (the model's own names, a tied weight once) and config.json into `folder`.

    The configuration is written last: a folder with a config.json is complete.

    Raises:
        MqAoError: the folder cannot be written.
    """
    folder = Path(folder)
    state = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    config: dict[str, Any] = {"model_type": model.model_type, **model.config.to_dict()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
