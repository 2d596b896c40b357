"""Shapes that are benched with random weights: speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mq_ao.extras import needs
from mq_ao.models import MAMBA2_130M, MAMBA_130M, Logits, MambaLM, language_model


def _transformers(name: str, **config: Any) -> Logits:
    """A model of transformers."""
    with needs(name, "hf"):
        import transformers
    shape = getattr(transformers, f"{name}Config")(**config)
    return Logits(getattr(transformers, f"{name}ForCausalLM")(shape))


_MAMBA2 = {"mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256}
_HYBRID = {**_MAMBA2, "vocab_size": 50280, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SHAPES: dict[str, Callable[[], MambaLM | Logits]] = {
    "mamba-130m": partial(language_model, MAMBA_130M),
    "mamba2-130m": partial(language_model, MAMBA2_130M),
    # 24 layers, of which 3 attend; 360 million parameters.
    "bamba-350m": partial(
        _transformers,
        "Bamba",
        **_HYBRID,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=24,
        mamba_n_heads=32,
        mamba_d_head=64,
        num_attention_heads=16,
        num_key_value_heads=4,
        attn_layer_indices=[5, 13, 21],
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    # 48 experts a layer, of which 4 are chosen, beside a shared one, as in Granite 4; 12 layers, of which 2 attend.
    "granite-moe-420m": partial(
        _transformers,
        "GraniteMoeHybrid",
        **_HYBRID,
        hidden_size=768,
        intermediate_size=256,
        shared_intermediate_size=512,
        num_hidden_layers=12,
        mamba_n_heads=24,
        mamba_d_head=64,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=48,
        num_experts_per_tok=4,
        position_embedding_type=None,
        layer_types=[*(["mamba"] * 5 + ["attention"]) * 2],
        tie_word_embeddings=True,
    ),
}


def random_model(name: str, seed: int = 0) -> MambaLM | Logits:
    """A model of a named shape, with the same weights each time.

    Raises:
        MqAoError: it is a model of a library that is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SHAPES[name]().eval()


def save_words(vocab_size: int, folder: Path) -> Path:
    """Writes a tokenizer of so many words, for shapes that have none; returns its folder.

    Raises:
        MqAoError: transformers is not installed.
    """
    with needs("a tokenizer", "hf"):
        import tokenizers
        import transformers
    words = {f"w{index}": index for index in range(vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder
