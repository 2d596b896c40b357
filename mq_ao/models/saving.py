"""Writing models to disk: every file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from mq_ao.models.mamba import MambaLM

MODEL_TYPE = "mq_ao.mamba"
"""`model_type` in the config.json of our own layout."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` under a temporary name beside `path`, then renames it.

    Raises:
        MqAoError: the folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)  # temporary files are 0600; a model is for everyone who may read the folder
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise MqAoError(f"{path} cannot be written ({reason}): choose a folder that you may write to.") from error


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
