"""transformers' Mamba on our weights, in eager mode (the optional peer `transformers`)."""

from __future__ import annotations

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
    """transformers' eager Mamba. Without its CUDA kernels the scan is a loop over tokens in Python."""

    def __init__(self, model: MambaLM) -> None:
        logging.set_verbosity_error()  # it warns that the CUDA kernels are missing
        self._model = convert(model)
        self._cache: Any = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, tied ones once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        self._cache = None
        return self._run(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        for token in ids.split(1, dim=1):
            logits = self._run(token)
        return logits

    @torch.no_grad()
    def _run(self, ids: Tensor) -> Tensor:
        output = self._model(ids, cache_params=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.cache_params
        return output.logits[0, -1]
