"""transformers' models in eager mode: a Mamba with our weights (the optional peer `transformers`), and hybrids."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

from mq_ao.models import MambaConfig as OurConfig
from mq_ao.models import MambaLM


def convert(model: MambaLM) -> MambaForCausalLM:
    """transformers' model with the weights of ours."""
    config = model.config
    assert isinstance(config, OurConfig), "prepare refuses the others"
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layer,
            layer_norm_epsilon=config.norm_epsilon,
            expand=config.expand,
            conv_kernel=config.d_conv,
            use_bias=config.bias,
            use_conv_bias=config.conv_bias,
            time_step_rank=config.rank,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    state = {name.replace("embedding.", "embeddings."): tensor for name, tensor in model.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.eval()


class Transformers:
    """transformers' eager model with its cache. Without its CUDA kernels Mamba's scan is a loop over tokens in Python.

    Args:
        model: any causal language model of theirs, or a Mamba of ours, which is converted.
    """

    def __init__(self, model: Any) -> None:
        logging.set_verbosity_error()  # it warns that the CUDA kernels are missing
        self._model = convert(model) if isinstance(model, MambaLM) else model
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._start()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, tied ones once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        self._start()
        return self._run(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        for token in ids.split(1, dim=1):
            logits = self._run(token)
        return logits

    def _start(self) -> None:
        self._cache: dict[str, Any] = {}
        self._read = 0

    @torch.no_grad()
    def _run(self, ids: Tensor) -> Tensor:
        # Some hybrids count from 0 at each call if they are not told, as their `generate` does.
        positions = {"position_ids": torch.arange(self._read, self._read + ids.shape[1])[None]}
        given = {**self._cache, **(positions if self._takes_positions else {})}
        output = self._model(ids, use_cache=True, logits_to_keep=1, **given)
        self._read += ids.shape[1]
        # Mamba calls it by another name than models with attention.
        name = "cache_params" if "cache_params" in output else "past_key_values"
        self._cache = {name: output[name]}
        return output.logits[0, -1]
