"""mamba_ssm's own model and CUDA kernels as a contender. It was not run on a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mq_ao.models import Mamba2Config, MambaConfig


def missing(config: MambaConfig | Mamba2Config) -> str | None:
    """Why it cannot be benched, or None if it can."""
    if not isinstance(config, MambaConfig):
        return "set up for Mamba-1 alone"
    for name in ("selective_scan_cuda", "causal_conv1d_cuda", "mamba_ssm.models.mixer_seq_simple"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # not installed, or built for another PyTorch
            return f"{name} cannot be imported: {error}"
    return None


class MambaSsm:
    """A model of the same shape; its weights are random, which its speed does not depend on."""

    def __init__(self, config: MambaConfig | Mamba2Config, dtype: torch.dtype, device: torch.device) -> None:
        from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        from mamba_ssm.utils.generation import InferenceParams

        theirs = TheirConfig(
            d_model=config.d_model,
            n_layer=config.n_layer,
            vocab_size=config.vocab_size,
            ssm_cfg={"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand},
        )
        self._model = MambaLMHeadModel(theirs, device=device, dtype=dtype).eval()
        self._fresh = lambda: InferenceParams(max_seqlen=1 << 30, max_batch_size=1)
        self._state: Any = self._fresh()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, tied ones once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        self._state = self._fresh()
        return self._run(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        for token in ids.split(1, dim=1):
            logits = self._run(token)
        return logits

    def _run(self, ids: Tensor) -> Tensor:
        output = self._model(ids, inference_params=self._state, num_last_tokens=1)
        self._state.seqlen_offset += ids.shape[1]
        return output.logits[0, -1]
