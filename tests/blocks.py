"""Small modules with Mamba blocks, for tests of what is around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mq_ao.lowering.language_graphs import find_states
from mq_ao.models import MambaConfig
from mq_ao.models.mamba import MambaMixer

X = [torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
"""Two batches of inputs, (batch, length, d_model)."""


class Blocks(nn.Module):
    """Mamba blocks on (batch, length, 16) floats; classes on it say what is around them."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=8, d_model=16, n_layer=count)
        self.mixers = nn.ModuleList(MambaMixer(config) for _ in range(count))
        self.eval()

    def blocks(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + mixer(x)[0]
        return x

    def forward(self, x: Any) -> Any:
        return self.blocks(x)


def output(quantized: Any, *inputs: Any) -> Tensor:
    """The first result of a quantized model; a language model that is given ids alone starts from zero states."""
    states = find_states(quantized.converted)
    if states is not None and len(inputs) == 1:
        inputs = (*inputs, *states.examples(len(inputs[0]), 0))
    with torch.no_grad():
        result = quantized.converted(*inputs)
    return result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
