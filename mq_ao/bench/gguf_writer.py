"""Writes a `MambaLM` as a GGUF file, for llama.cpp (the optional peer of `mq-ao bench`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mq_ao.errors import MqAoError
from mq_ao.models import MambaConfig, MambaLM

if TYPE_CHECKING:
    import numpy

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
    assert isinstance(config, MambaConfig), "prepare refuses the others"
    if config.bias:
        raise MqAoError("llama.cpp's Mamba has no bias in in_proj and out_proj: this model cannot be written as GGUF.")
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
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    named = {
        "token_embd.weight": state["backbone.embedding.weight"],
        "output_norm.weight": state["backbone.norm_f.weight"],
    }
    if not model.config.tie_embeddings:
        named["output.weight"] = state["lm_head.weight"]
    # llama.cpp adds the convolution's bias unasked, so a model without one gets zeros.
    no_bias = torch.zeros(model.config.d_inner)
    for index in range(model.config.n_layer):
        ours, theirs = f"backbone.layers.{index}.", f"blk.{index}."
        for name, target in _LAYER.items():
            named[theirs + target] = state.get(ours + name, no_bias)
        named[theirs + "ssm_conv1d.weight"] = state[ours + "mixer.conv1d.weight"].squeeze(1)
        named[theirs + "ssm_a"] = -torch.exp(state[ours + "mixer.A_log"])
    return {name: tensor.contiguous().numpy() for name, tensor in named.items()}


_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
"""A layer's weights that GGUF stores as they are."""
