"""Writing models to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import safetensors.torch
from torch import Tensor

from mq_ao.files import write_atomically


class Model(Protocol):
    """One of ours."""

    model_type: ClassVar[str]
    """What its config.json says it is."""

    @property
    def config(self) -> Any:
        """The model's shape, with `to_dict`."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As of any module."""


def save_pretrained(model: Model, folder: str | Path) -> None:
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
