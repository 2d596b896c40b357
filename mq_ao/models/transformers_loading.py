"""Language models that `MambaLM` does not compute, loaded through transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mq_ao.errors import MqAoError
from mq_ao.memory import check_room
from mq_ao.models.config_json import read_json
from mq_ao.models.layouts import TRANSFORMERS_FAMILIES
from mq_ao.models.loading import find
from mq_ao.models.mamba import MambaLM
from mq_ao.models.weights import check_finite, listed

logger = logging.getLogger(__name__)


def load(source: str | Path) -> nn.Module:
    """Loads any language model that can be quantized, in float32, in evaluation mode.

    Args:
        source: as in `MambaLM.from_pretrained`.

    Returns:
        A `MambaLM` where it is one; of FalconMamba and the hybrids transformers' own model, to be captured as it is.

    Raises:
        MqAoError: the source is not found, is another kind of model, does not fit into memory, its weights are missing,
            of another shape or not finite, or transformers is needed and not installed, or cannot load it.
    """
    folder = find(source)
    if read_json(folder / "config.json").get("model_type") in TRANSFORMERS_FAMILIES:
        return load_folder(folder)
    return MambaLM.from_pretrained(folder)


def load_folder(folder: Path) -> nn.Module:
    """The causal language model in `folder`, by transformers; see `load`."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MqAoError(f'{folder} is loaded by transformers: run pip install "mq-ao[hf]".') from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        check_room(empty, str(folder))
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            # Told in `info`, and refused by `_check`.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _check(model, info)
    except MqAoError as error:
        raise MqAoError(f"{folder} cannot be loaded: {error}") from error
    except Exception as error:  # its errors have no base class in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MqAoError(
            f"transformers cannot load {folder} ({reason}): fetch it again, or load it yourself."
        ) from error
    return model.eval()


def _check(model: nn.Module, info: dict[str, Any]) -> None:
    """transformers draws missing weights at random, and says so in its log only."""
    if missing := info["missing_keys"]:
        raise MqAoError(f"weights are missing: {listed(missing)}.")
    if mismatched := info["mismatched_keys"]:
        wrong = [f"{name} is {tuple(given)} and should be {tuple(shape)}" for name, given, shape in mismatched]
        raise MqAoError(f"weights do not fit the configuration: {listed(wrong)}.")
    if extra := info["unexpected_keys"]:
        logger.warning("weights that %s does not have are left out: %s", type(model).__name__, listed(extra))
    check_finite(dict(model.named_parameters()))


class Logits(nn.Module):
    """A language model of transformers as a function of token ids alone.

    Args:
        model: any causal language model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (batch, length) int64 -> logits (batch, length, vocab_size)."""
        return self.model(input_ids, use_cache=False).logits
