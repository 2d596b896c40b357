"""From a name to a `Vim`: the bundled model, local folders and public checkpoint files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models import vision_demo
from mq_ao.models.checkpoint import read_file, read_weights
from mq_ao.models.layouts import own_config, read_json
from mq_ao.models.vim import Vim
from mq_ao.models.vision_config import VimConfig
from mq_ao.models.weights import fitted

_FIRST = "layers.0.mixer."


def load(source: str | Path, image_size: int | None = None, stride: int | None = None) -> Vim:
    """Loads a Vim in float32, in evaluation mode.

    Args:
        source: `"demo"` (the bundled model), a folder that `save_pretrained` wrote, or a file with the weights of a
            public checkpoint.
        image_size: of a public checkpoint, which does not tell it; 224 if not given.
        stride: of a public checkpoint fine-tuned on overlapping patches; its patch size if not given.

    Raises:
        MqAoError: the source is not found, is another kind of model, or its weights are missing, extra, of another
            shape, not finite, or cannot be read.
    """
    path = vision_demo.FOLDER if source == "demo" else Path(source).expanduser()
    if not path.exists():
        raise MqAoError(f"there is no file or folder {path}: give one, or demo.")
    try:
        if path.is_file():
            weights = read_file(path)
            return _build(_described(weights, image_size or VimConfig.image_size, stride), weights)
        if image_size is not None or stride is not None:
            raise MqAoError("its config.json has image_size and stride: do not give them.")
        values = read_json(path / "config.json")
        if (family := values.get("model_type")) != Vim.model_type:
            raise MqAoError(f'model_type is {family!r}, and a Vim\'s is "{Vim.model_type}".')
        return _build(own_config(values, VimConfig), read_weights(path))
    except MqAoError as error:
        raise MqAoError(f"{path} cannot be loaded: {error}") from error


def _build(config: VimConfig, weights: Mapping[str, Tensor]) -> Vim:
    with torch.device("meta"):
        model = Vim(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(fitted(weights, expected), assign=True)
    return model.eval()


def _described(weights: Mapping[str, Tensor], image_size: int, stride: int | None) -> VimConfig:
    """The shape of a public checkpoint, whose blocks are those of "bimamba v2" with a middle class token."""
    telling = [_FIRST + name for name in ("A_log", "conv1d.weight", "dt_proj.weight")]
    telling += ["patch_embed.proj.weight", "pos_embed", "head.weight"]
    if missing := [name for name in telling if name not in weights]:
        raise MqAoError(f"{', '.join(missing)} missing: is it a Vim of the public layout?")
    if _FIRST + "A_b_log" not in weights:
        raise MqAoError("its blocks have one direction: only the bidirectional version 2 can be loaded.")
    a_log, taps, dt_proj, patches, positions, head = (weights[name] for name in telling)
    d_model, in_channels, patch_size, _ = patches.shape
    config = VimConfig(
        image_size=image_size,
        patch_size=patch_size,
        stride=stride,
        in_channels=in_channels,
        num_classes=head.shape[0],
        d_model=d_model,
        n_layer=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        d_state=a_log.shape[1],
        d_conv=taps.shape[-1],
        expand=a_log.shape[0] // d_model,
        dt_rank=dt_proj.shape[1],
        bias=_FIRST + "in_proj.bias" in weights,
        conv_bias=_FIRST + "conv1d.bias" in weights,
    )
    if positions.shape[1] != config.patches + 1:
        raise MqAoError(
            f"it has {positions.shape[1] - 1} position embeddings of patches, and an image of {image_size} pixels with "
            f"a stride of {config.steps} has {config.patches}: give its image_size and stride."
        )
    return config
