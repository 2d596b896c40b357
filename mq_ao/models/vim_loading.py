"""From a name to a `Vim`: the bundled model, local folders and public checkpoint files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models import vision_demo
from mq_ao.models.pretrained import reads
from mq_ao.models.vim import Vim
from mq_ao.models.vision_config import VimConfig
from mq_ao.models.vision_loading import load_vision, mixer_shape, telling


@reads(Vim)
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
    given = {"image_size": image_size, "stride": stride}

    def described(weights: dict[str, Tensor]) -> tuple[VimConfig, dict[str, Tensor]]:
        return _described(weights, image_size or VimConfig.image_size, stride), weights

    return load_vision(Vim, Vim.model_type, VimConfig, path, described, given)


def _described(weights: Mapping[str, Tensor], image_size: int, stride: int | None) -> VimConfig:
    """The shape of a public checkpoint, whose blocks are those of "bimamba v2" with a middle class token."""
    first = "layers.0.mixer.A_log"
    _, patches, positions, head = telling(
        weights, [first, "patch_embed.proj.weight", "pos_embed", "head.weight"], "Vim"
    )
    if "layers.0.mixer.A_b_log" not in weights:
        raise MqAoError("its blocks have one direction: only the bidirectional version 2 can be loaded.")
    d_model, in_channels, patch_size, _ = patches.shape
    config = VimConfig(
        image_size=image_size,
        patch_size=patch_size,
        stride=stride,
        in_channels=in_channels,
        num_classes=head.shape[0],
        d_model=d_model,
        **mixer_shape(weights, d_model, "Vim"),
    )
    if positions.shape[1] != config.patches + 1:
        raise MqAoError(
            f"it has {positions.shape[1] - 1} position embeddings of patches, and an image of {image_size} pixels with "
            f"a stride of {config.steps} has {config.patches}: give its image_size and stride."
        )
    return config
