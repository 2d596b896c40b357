"""The config.json layouts that `loading` understands.

Sources: `transformers.MambaConfig` (5.x) and `mamba_ssm.models.config_mamba.MambaConfig` (2.3).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from mq_ao.errors import MqAoError
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.models.config_json import limits, number, read_json
from mq_ao.models.mamba import MambaLM
from mq_ao.models.mamba2 import Mamba2LM
from mq_ao.models.mamba_nd import MambaND
from mq_ao.models.mamba_nd_config import MambaNDConfig
from mq_ao.models.vim import Vim
from mq_ao.models.vision_config import VimConfig

TRANSFORMERS_FAMILIES = (
    "falcon_mamba",
    "jamba",
    "bamba",
    "zamba2",
    "falcon_h1",
    "granitemoehybrid",
    "nemotron_h",
)
"""`model_type` of what is captured as transformers computes it, and is no `MambaLM`."""

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


def read_config(folder: Path) -> MambaConfig | Mamba2Config:
    """What `folder`/config.json says of a model's shape.

    Raises:
        MqAoError: the file is missing or broken, or describes a model that `MambaLM` does not compute.
    """
    path = folder / "config.json"
    values = read_json(path)
    try:
        return _config(values)
    except MqAoError as error:
        raise MqAoError(f"{path}: {error}") from error


def _config(values: dict[str, Any]) -> MambaConfig | Mamba2Config:
    family = values.get("model_type")
    if family == MambaLM.model_type:
        return own_config(values, MambaConfig)
    if family == Mamba2LM.model_type:
        return own_config(values, Mamba2Config)
    if family == "mamba":
        return _transformers_config(values)
    if family == "mamba2":
        return _transformers_mamba2_config(values)
    if family is None and {"d_model", "n_layer"} <= values.keys():
        return _mamba_ssm_config(values)
    if family is None:
        raise MqAoError('neither "model_type" nor the d_model and n_layer of mamba_ssm are there: is it a Mamba model?')
    if family in TRANSFORMERS_FAMILIES:
        raise MqAoError(
            f'model_type is "{family}", which is no MambaLM: mq_ao.models.load loads it '
            "through transformers, to be quantized."
        )
    if family in (Vim.model_type, MambaND.model_type):
        raise MqAoError(f'model_type is "{family}", which is no language model: load it with its class.')
    raise MqAoError(
        f'model_type is "{family}": "mamba", "mamba2", the mamba_ssm layout, and through transformers '
        f"{', '.join(TRANSFORMERS_FAMILIES)} can be loaded."
    )


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


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The options of transformers that are not null; an option that is null has its default."""
    given = {key: value for key, value in values.items() if value is not None}
    if missing := sorted({"vocab_size", "hidden_size", "num_hidden_layers"} - given.keys()):
        raise MqAoError(f"{', '.join(missing)} missing.")
    if (activation := given.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise MqAoError(f'hidden_act is "{activation}": only silu is supported.')
    return given


def _transformers_config(values: dict[str, Any]) -> MambaConfig:
    values = _given(values)
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
        norm_epsilon=number(values.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon"),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )
    width = values.get("intermediate_size", config.d_inner)
    if width != config.d_inner:
        raise MqAoError(f"intermediate_size is {width}: only expand * hidden_size ({config.d_inner}) is supported.")
    return config


def _transformers_mamba2_config(values: dict[str, Any]) -> Mamba2Config:
    values = _given(values)
    dt_min, dt_max = limits(values.get("time_step_limit"), "time_step_limit")
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
        norm_epsilon=number(values.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon"),
        tie_embeddings=values.get("tie_word_embeddings", False),
        dt_min=dt_min,
        dt_max=dt_max,
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
    padded = -(-vocab_size // multiple) * multiple
    common = {
        "vocab_size": padded,
        "known_tokens": vocab_size if vocab_size < padded else None,
        "d_model": values["d_model"],
        "n_layer": values["n_layer"],
        "tie_embeddings": values.get("tie_embeddings", True),
    }
    if layer == "Mamba1":
        return MambaConfig(**common, **shape)
    dt_min, dt_max = limits(shape.pop("dt_limit", None), "ssm_cfg.dt_limit")
    # Its gated norm has as many groups as B and C.
    return Mamba2Config(**common, **shape, dt_min=dt_min, dt_max=dt_max, norm_groups=shape.get("ngroups", 1))
