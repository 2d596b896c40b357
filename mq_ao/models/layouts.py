"""The config.json layouts that `loading` understands, and how their names map to ours.

Sources: `transformers.MambaConfig` (5.x) and `mamba_ssm.models.config_mamba.MambaConfig` (2.3).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mq_ao.errors import MqAoError
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.models.mamba import MambaLM
from mq_ao.models.mamba2 import Mamba2LM
from mq_ao.models.mamba_nd_config import MambaNDConfig
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
_MAMBA_SSM_CFG_SHAPE = {
    "Mamba1": frozenset({"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}),
    "Mamba2": frozenset(
        {
            "d_state",
            "d_conv",
            "expand",
            "headdim",
            "ngroups",
            "D_has_hdim",
            "norm_before_gate",
            "dt_limit",
            "bias",
            "conv_bias",
        }
    ),
}
# What else Mamba-2 layers may be told, and the only value that we compute.
_MAMBA2_CFG_FIXED = {"rmsnorm": True, "d_ssm": None, "activation": "swish"}


_Config = TypeVar("_Config", MambaConfig, Mamba2Config, VimConfig, MambaNDConfig)


@dataclass(frozen=True)
class Layout:
    """What a folder's config.json says.

    Attributes:
        config: the model's shape.
        rename: maps a weight's name in the folder to ours.
    """

    config: MambaConfig | Mamba2Config
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
    if family == Mamba2LM.model_type:
        return Layout(own_config(values, Mamba2Config), str)
    if family == "mamba":
        return Layout(_transformers_config(values), _from_transformers)
    if family == "mamba2":
        return Layout(_transformers_mamba2_config(values), _from_transformers)
    if family is None and {"d_model", "n_layer"} <= values.keys():
        return Layout(_mamba_ssm_config(values), str)
    if family is None:
        raise MqAoError('neither "model_type" nor the d_model and n_layer of mamba_ssm are there: is it a Mamba model?')
    raise MqAoError(f'model_type is "{family}", and only "mamba", "mamba2" and the mamba_ssm layout can be loaded.')


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


def _transformers_mamba2_config(values: dict[str, Any]) -> Mamba2Config:
    required = {"vocab_size", "hidden_size", "num_hidden_layers"}
    if missing := sorted(required - values.keys()):
        raise MqAoError(f"{', '.join(missing)} missing.")
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise MqAoError(f'hidden_act is "{activation}": only silu is supported.')
    config = Mamba2Config(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        n_layer=values["num_hidden_layers"],
        d_state=values.get("state_size", 128),
        d_conv=values.get("conv_kernel", 4),
        expand=values.get("expand", 2),
        headdim=values.get("head_dim", 64),
        ngroups=values.get("n_groups", 8),
        norm_groups=values.get("n_groups", 8),
        bias=values.get("use_bias", False),
        conv_bias=values.get("use_conv_bias", True),
        norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", False),
        **_limits(values.get("time_step_limit", (0.0, math.inf))),
    )
    heads = values.get("num_heads", config.heads)
    if heads != config.heads:
        raise MqAoError(f"num_heads is {heads}: only expand * hidden_size / head_dim ({config.heads}) is supported.")
    if not values.get("rms_norm", True):
        raise MqAoError("rms_norm is false: only blocks with a gated norm are supported.")
    return config


def _mamba_ssm_config(values: dict[str, Any]) -> MambaConfig | Mamba2Config:
    ssm = values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise MqAoError(f"ssm_cfg is {ssm!r}: it has to be an object.")
    layer = ssm.get("layer", "Mamba1")
    refusals = {
        "attention layers (attn_layer_idx)": bool(values.get("attn_layer_idx")),
        "MLP layers (d_intermediate)": bool(values.get("d_intermediate")),
        "LayerNorm (rms_norm false)": not values.get("rms_norm", True),
        f"layers of the kind {layer!r} (ssm_cfg)": layer not in _MAMBA_SSM_CFG_SHAPE,
    }
    if refused := [what for what, present in refusals.items() if present]:
        raise MqAoError(f"the model has {' and '.join(refused)}: only plain Mamba with RMSNorm can be loaded.")
    known = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "d_intermediate", "rms_norm"}
    known |= {"tie_embeddings", "pad_vocab_size_multiple"} | _MAMBA_SSM_HARMLESS | _BOOKKEEPING
    unknown = sorted(key for key in values.keys() - known if not key.startswith("_"))
    shape = {key: ssm[key] for key in _MAMBA_SSM_CFG_SHAPE[layer] & ssm.keys()}
    harmless = _MAMBA_SSM_CFG_HARMLESS | ({"chunk_size", "A_init_range"} if layer == "Mamba2" else set())
    fixed = _MAMBA2_CFG_FIXED if layer == "Mamba2" else {}
    others = {key for key in ssm.keys() - shape.keys() - harmless if key not in fixed or ssm[key] != fixed[key]}
    unknown += sorted(f"ssm_cfg.{key}" for key in others)
    if unknown:
        raise MqAoError(f"options {', '.join(unknown)} are not known, and might change what the model computes.")
    vocab_size, multiple = values.get("vocab_size"), values.get("pad_vocab_size_multiple", 8)
    if not (isinstance(vocab_size, int) and isinstance(multiple, int) and vocab_size > 0 and multiple > 0):
        raise MqAoError(f"vocab_size is {vocab_size!r} and pad_vocab_size_multiple {multiple!r}: give whole numbers.")
    common = {
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "d_model": values["d_model"],
        "n_layer": values["n_layer"],
        "tie_embeddings": values.get("tie_embeddings", True),
    }
    if layer == "Mamba1":
        return MambaConfig(**common, **shape)
    # Its gated norm has as many groups as B and C.
    limits = _limits(shape.pop("dt_limit", (0.0, math.inf)))
    return Mamba2Config(**common, **shape, **limits, norm_groups=shape.get("ngroups", 1))


def _limits(given: Sequence[float]) -> dict[str, Any]:
    """dt_min and dt_max from (smallest, largest), of which the latter may be infinite."""
    low, high = given
    return {"dt_min": low, "dt_max": None if math.isinf(high) else high}
