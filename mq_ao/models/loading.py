"""From a name to a `MambaLM` or `Mamba2LM`: the bundled model, local folders and hub ids."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.memory import check_room
from mq_ao.models import demo
from mq_ao.models.checkpoint import FILES, has_weights, read_weights
from mq_ao.models.layouts import read_config
from mq_ao.models.mamba import MambaLM
from mq_ao.models.mamba2 import language_model
from mq_ao.models.names import language_model_names
from mq_ao.models.pretrained import reads
from mq_ao.models.weights import fitted

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@reads(MambaLM)
def load(source: str | Path) -> MambaLM:
    """Loads a Mamba language model, of version 1 or 2, in float32, in evaluation mode.

    Args:
        source: `"demo"` (the bundled model), a folder (transformers', mamba_ssm's or our layout) or a hub id.
            A folder goes before a hub id of the same name; a `Path` is always a folder.

    Raises:
        MqAoError: the source is not found, is another kind of model, does not fit into memory, or its weights are
            missing, extra, of another shape, not finite, or cannot be read.
    """
    return load_folder(find(source))


def find(source: str | Path) -> Path:
    """The folder of a model, fetched if `source` is a hub id; see `load`.

    Raises:
        MqAoError: it is not found.
    """
    if source == "demo":
        return demo.FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise MqAoError(f"{path} is a file: give the folder that holds config.json and the weights.")
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _download(source)
    raise MqAoError(f"there is no folder {source}: check the path.")


def load_folder(folder: Path) -> MambaLM:
    """Loads the model in `folder`; see `load`."""
    config = read_config(folder)
    with torch.device("meta"):
        model = language_model(config)
    check_room(model, str(folder))
    try:
        weights = _matched(model, read_weights(folder))
    except MqAoError as error:
        raise MqAoError(f"{folder} cannot be loaded: {error}") from error
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    return model.eval()


def _matched(model: MambaLM, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored weights in float32 under our names; an error names those that are not the model's."""
    weights = language_model_names(stored)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    embedding = weights.get("backbone.embedding.weight")
    if model.config.tie_embeddings and embedding is not None:
        head = weights.setdefault("lm_head.weight", embedding)
        if not torch.equal(head, embedding):
            raise MqAoError("the configuration ties the head to the embedding, and lm_head.weight differs from it.")
    if expected.keys() - weights.keys() == {"lm_head.weight"}:
        raise MqAoError(
            "its weights are those of the base model, without a head, and the configuration does not tie the head to "
            "the embedding: save the language model with its lm_head.weight."
        )
    return fitted(weights, expected)


def _download(source: str) -> Path:
    """Fetches a hub model's configuration and weights into the hub's cache, as safetensors if there are."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MqAoError(
            f"there is no folder {source}, and hub ids need huggingface_hub: check the path, or run "
            'pip install "mq-ao[hf]".'
        ) from error
    safe = [name for name in FILES if "safetensors" in name]
    folder = Path()
    for patterns in ([*safe, "model-*.safetensors"], ["pytorch_model*.bin", "pytorch_model.bin.index.json"]):
        try:
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=["config.json", *patterns]))
        except Exception as error:  # the hub's errors have no base class in common
            reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
            raise MqAoError(
                f"there is no folder {source}, and the hub gave no model of that name ({reason}): "
                "check the spelling and the network."
            ) from error
        if has_weights(folder):
            break
    return folder
