"""Writes a `MambaLM` as a GGUF file, for llama.cpp (the optional peer of `mq-ao bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    import numpy

    from mq_ao.models import MambaLM

CONTEXT_LENGTH = 1 << 20
"""A Mamba has no limit of its own; llama.cpp wants a number."""


def write_f32(model: MambaLM, path: Path) -> None:
    """Writes the model's weights in float32, without a tokenizer.

    Args:
        model: float model.
        path: file to write.

    Raises:
        MqAoError: the `gguf` package is missing, or the model has biases that llama.cpp's Mamba has not.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    except ImportError as error:
        raise MqAoError("writing GGUF needs the gguf package: pip install gguf.") from error
    config = model.config
    if config.bias:
        raise MqAoError(
            "llama.cpp's Mamba has no bias in in_proj and out_proj: this model cannot be written as GGUF."
        )
    writer = GGUFWriter(path, "mamba")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.rank)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for name, array in tensors(model).items():
        writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def tensors(model: MambaLM) -> dict[str, numpy.ndarray]:
    """The model's weights as float32 arrays, by their GGUF names (the table of gguf's MODEL_ARCH.MAMBA)."""
    named = {
        "token_embd.weight": model.backbone.embedding.weight,
        "output_norm.weight": model.backbone.norm_f.weight,
    }
    if not model.config.tie_embeddings:
        named["output.weight"] = model.lm_head.weight
    for index, layer in enumerate(model.backbone.layers):
        mixer = layer.mixer
        block = {
            "attn_norm.weight": layer.norm.weight,
            "ssm_in.weight": mixer.in_proj.weight,
            "ssm_conv1d.weight": mixer.conv1d.weight.squeeze(1),
            # llama.cpp adds the bias unasked, so a model without one gets zeros.
            "ssm_conv1d.bias": _or_zeros(mixer.conv1d.bias, model.config.d_inner),
            "ssm_x.weight": mixer.x_proj.weight,
            "ssm_dt.weight": mixer.dt_proj.weight,
            "ssm_dt.bias": mixer.dt_proj.bias,
            "ssm_a": -torch.exp(mixer.A_log.float()),
            "ssm_d": mixer.D,
            "ssm_out.weight": mixer.out_proj.weight,
        }
        named.update({f"blk.{index}.{name}": tensor for name, tensor in block.items()})
    return {name: tensor.detach().float().contiguous().numpy() for name, tensor in named.items()}


def _or_zeros(bias: torch.Tensor | None, size: int) -> torch.Tensor:
    return torch.zeros(size) if bias is None else bias
