"""The config.json layouts that `loading` understands, and how their names map to ours.

Sources: `transformers.MambaConfig` (5.x) and `mamba_ssm.models.config_mamba.MambaConfig` (2.3).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mq_ao.errors import MqAoError
from mq_ao.models.config import MambaConfig
from mq_ao.models.mamba import MambaLM
from mq_ao.models.vision_config import VimConfig

# Keys that any library may add to a config.json and that say nothing about the mathematics.
_BOOKKEEPING = frozenset(
    {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "name_or_path"}
)

# mamba_ssm: how the initial weights are drawn, which kernel runs, and in which dtype the residual is kept.
_MAMBA_SSM_HARMLESS = frozenset({"residual_in_fp32", "fused_add_norm", "attn_cfg"})
_MAMBA_SSM_CFG_HARMLESS = frozenset(
    {"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}
)
_MAMBA_SSM_CFG_SHAPE = frozenset({"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"})


_Config = TypeVar("_Config", MambaConfig, VimConfig)


@dataclass(frozen=True)
class Layout:
    """What a folder's config.json says.

    Attributes:
        config: the model's shape.
        rename: maps a weight's name in the folder to ours.
    """

    config: MambaConfig
    rename: Callable[[str], str]


def read_layout(folder: Path) -> Layout:
    """Reads `folder`/config.json.

    Raises:
        MqAoError: the file is missing or broken, or describes a model that `MambaLM` does not compute.
    """
    path = folder / "config.json"
    values = read_json(path)
    try:
        return _layout(values)
    except MqAoError as error:
        raise MqAoError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        MqAoError: the file is missing or broken.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MqAoError(
            f"{path.parent} has no config.json: give the folder of a transformers, mamba_ssm or mq_ao Mamba model."
        ) from None
    except (OSError, ValueError) as error:
        raise MqAoError(f"{path} cannot be read as JSON ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise MqAoError(f"{path} is not a JSON object: give the folder of a Mamba model.")
    return values


def _layout(values: dict[str, Any]) -> Layout:
    family = values.get("model_type")
    if family == MambaLM.model_type:
        return Layout(own_config(values, MambaConfig), str)
    if family == "mamba":
        return Layout(_transformers_config(values), _from_transformers)
    if family is None and {"d_model", "n_layer"} <= values.keys():
        return Layout(_mamba_ssm_config(values), str)
    if family is None:
        raise MqAoError('neither "model_type" nor the d_model and n_layer of mamba_ssm are there: is it a Mamba model?')
    raise MqAoError(f'model_type is "{family}", and only Mamba-1 can be loaded ("mamba", or the mamba_ssm layout).')


def own_config(values: dict[str, Any], kind: type[_Config]) -> _Config:
    """The configuration in a config.json of our own layout.

    Raises:
        MqAoError: keys are missing or unknown, or a value is not what it should be.
    """
    values = {key: value for key, value in values.items() if key != "model_type"}
    fields = dataclasses.fields(kind)
    if unknown := sorted(values.keys() - {field.name for field in fields}):
        raise MqAoError(f"unknown keys {', '.join(unknown)}: was it written by a later version?")
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise MqAoError(f"{', '.join(missing)} missing.")
    return kind(**values)


def _from_transformers(name: str) -> str:
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def _transformers_config(values: dict[str, Any]) -> MambaConfig:
    if missing := sorted({"vocab_size", "hidden_size", "num_hidden_layers"} - values.keys()):
        raise MqAoError(f"{', '.join(missing)} missing.")
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise MqAoError(f'hidden_act is "{activation}": only silu is supported.')
    config = MambaConfig(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        n_layer=values["num_hidden_layers"],
        d_state=values.get("state_size", 16),
        d_conv=values.get("conv_kernel", 4),
        expand=values.get("expand", 2),
        dt_rank=values.get("time_step_rank", "auto"),
        bias=values.get("use_bias", False),
        conv_bias=values.get("use_conv_bias", True),
        norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )
    width = values.get("intermediate_size", config.d_inner)
    if width != config.d_inner:
        raise MqAoError(f"intermediate_size is {width}: only expand * hidden_size ({config.d_inner}) is supported.")
    return config


def _mamba_ssm_config(values: dict[str, Any]) -> MambaConfig:
    ssm = values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise MqAoError(f"ssm_cfg is {ssm!r}: it has to be an object.")
    refusals = {
        "attention layers (attn_layer_idx)": bool(values.get("attn_layer_idx")),
        "MLP layers (d_intermediate)": bool(values.get("d_intermediate")),
        "LayerNorm (rms_norm false)": not values.get("rms_norm", True),
        f"layers of the kind {ssm.get('layer')!r} (ssm_cfg)": ssm.get("layer", "Mamba1") != "Mamba1",
    }
    if refused := [what for what, present in refusals.items() if present]:
        raise MqAoError(f"the model has {' and '.join(refused)}: only plain Mamba-1 with RMSNorm can be loaded.")
    known = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "d_intermediate", "rms_norm"}
    known |= {"tie_embeddings", "pad_vocab_size_multiple"} | _MAMBA_SSM_HARMLESS | _BOOKKEEPING
    unknown = sorted(key for key in values.keys() - known if not key.startswith("_"))
    unknown += sorted(f"ssm_cfg.{key}" for key in ssm.keys() - _MAMBA_SSM_CFG_SHAPE - _MAMBA_SSM_CFG_HARMLESS)
    if unknown:
        raise MqAoError(f"options {', '.join(unknown)} are not known, and might change what the model computes.")
    vocab_size, multiple = values.get("vocab_size"), values.get("pad_vocab_size_multiple", 8)
    if not (isinstance(vocab_size, int) and isinstance(multiple, int) and vocab_size > 0 and multiple > 0):
        raise MqAoError(f"vocab_size is {vocab_size!r} and pad_vocab_size_multiple {multiple!r}: give whole numbers.")
    return MambaConfig(
        vocab_size=-(-vocab_size // multiple) * multiple,
        d_model=values["d_model"],
        n_layer=values["n_layer"],
        tie_embeddings=values.get("tie_embeddings", True),
        **{key: ssm[key] for key in _MAMBA_SSM_CFG_SHAPE & ssm.keys()},
    )
