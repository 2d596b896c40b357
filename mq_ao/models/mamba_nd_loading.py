"""From a name to a `MambaND`: local folders and public checkpoint files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models.mamba_nd import MambaND
from mq_ao.models.mamba_nd_config import MAMBA_2D_SMALL, MAMBA_3D_SMALL, MambaNDConfig
from mq_ao.models.pretrained import reads
from mq_ao.models.vision_loading import load_vision, mixer_shape, telling

_RENAMED = ((r"^backbone\.", ""), (r"^head\.fc\.", "head."), (r"^cls_head\.fc_cls\.", "head."))
"""Public names and ours: the heads are those of the libraries in which images and videos were trained."""
_MERGING = re.compile(r"^layers\.(\d+)\.down_sample_layer\.reduction\.weight$")


@reads(MambaND)
def load(
    source: str | Path, image_size: tuple[int, ...] | None = None, residual_of_norm: bool | None = None
) -> MambaND:
    """Loads a Mamba-ND in float32, in evaluation mode.

    Args:
        source: a folder that `save_pretrained` wrote, or a file with the weights of a public checkpoint.
        image_size: of a public checkpoint, which does not tell it; (224, 224) of images and (32, 224, 224) of videos
            if not given.
        residual_of_norm: of a public checkpoint, which does not tell it: False if it was trained with
            `fused_add_norm`; True if not given, as all public configurations are.

    Raises:
        MqAoError: the source is not found, is another kind of model, or its weights are missing, extra, of another
            shape, not finite, or cannot be read.
    """
    given = {"image_size": image_size, "residual_of_norm": residual_of_norm}

    def described(stored: dict[str, Tensor]) -> tuple[MambaNDConfig, dict[str, Tensor]]:
        weights = {_renamed(name): value for name, value in stored.items()}
        return _described(weights, image_size, residual_of_norm is not False)

    return load_vision(MambaND, MambaND.model_type, MambaNDConfig, Path(source).expanduser(), described, given)


def _renamed(name: str) -> str:
    for pattern, own in _RENAMED:
        name = re.sub(pattern, own, name)
    return name


def _described(
    weights: Mapping[str, Tensor], image_size: tuple[int, ...] | None, residual_of_norm: bool
) -> tuple[MambaNDConfig, dict[str, Tensor]]:
    """The shape of a public checkpoint, and its weights without the position of an unused class token."""
    names = ["patch_embed.projection.weight", "pos_embed", "head.weight"]
    patches, positions, head = telling(weights, names, "Mamba-ND")
    if patches.dim() not in (4, 5):
        raise MqAoError(f"its patches are {tuple(patches.shape)}: only images and videos can be loaded.")
    d_model, in_channels, *patch_size = patches.shape
    usual = MAMBA_2D_SMALL if len(patch_size) == 2 else MAMBA_3D_SMALL
    config = MambaNDConfig(
        image_size=usual.image_size if image_size is None else image_size,
        patch_size=tuple(patch_size),
        in_channels=in_channels,
        num_classes=head.shape[0],
        d_model=d_model,
        downsample=tuple(sorted(int(found[1]) for found in map(_MERGING.match, weights) if found)),
        residual_of_norm=residual_of_norm,
        final_norm="ln1.weight" in weights,
        pooled_norm="ln2.weight" in weights,
        **mixer_shape(weights, d_model, "Mamba-ND"),
    )
    extra = positions.shape[1] - config.patches
    if extra not in (0, 1):
        raise MqAoError(
            f"it has {positions.shape[1]} position embeddings, and an input of {config.image_size} with patches of "
            f"{config.patch_size} has {config.patches}: give its image_size."
        )
    return config, {**weights, "pos_embed": positions[:, extra:]}
