"""mamba_ssm's language models and hybrids with their states, against the package's own reference functions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.capture.stateful_export import export_with_states
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models.generate import generate
from tests import test_capture_mamba_ssm as source
from tests.captured import difference
from tests.test_capture_mamba_ssm import CLOSE, language_model

mamba_ssm, eager = source.mamba_ssm, source.eager  # fixtures

ATTENTION = {"causal": True, "num_heads": 4, "num_heads_kv": 2, "head_dim": 8}
HYBRID = {"rms_norm": True, "fused_add_norm": True, "attn_layer_idx": [1]}
WITH_STATES: dict[str, dict[str, Any]] = {
    "no attention": {"rms_norm": True, "fused_add_norm": True},
    "attention": {**HYBRID, "attn_cfg": ATTENTION},
    "a convolution before attention": {**HYBRID, "attn_cfg": {**ATTENTION, "d_conv": 4, "softmax_scale": 0.2}},
    "an MLP beside attention": {**HYBRID, "attn_cfg": {**ATTENTION, "mlp_dim": 256}, "d_intermediate": 48},
}


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("name", WITH_STATES)
def test_language_model_with_states(mamba_ssm: ModuleType, eager: Callable[..., Tensor], layer: str, name: str) -> None:
    """Pieces of any length give what the package gives for all, and the same model still runs afterwards."""
    model = language_model(mamba_ssm, layer, **WITH_STATES[name])
    run = StatefulGraph(export_with_states(model).module(check_guards=False))
    assert any(item.grows for item in run.states.items) == ("attn_cfg" in WITH_STATES[name])
    for batch, lengths in ((1, [1, 1, 1]), (2, [7, 1, 4]), (3, [2, 11])):
        ids = torch.randint(0, 64, (batch, sum(lengths)))
        states: list[Any] = []
        found = []
        for piece in ids.split(lengths, dim=1):
            logits, *states = run(piece, *states)
            found.append(logits)
        assert difference(torch.cat(found, dim=1), eager(model, ids)) < CLOSE


def test_a_quantized_hybrid_generates(mamba_ssm: ModuleType) -> None:
    model = language_model(mamba_ssm, "Mamba2", **WITH_STATES["attention"])
    quantized = mq_ao.quantize(model, [torch.randint(0, 64, (4, 32))], "mambaquant-w8a8", backend="cuda")
    program = quantized.lower()
    assert not program.info["simulated"] and program.integer_kernels
    prompt = torch.randint(0, 64, (2, 6))
    simulation = StatefulGraph(quantized.converted, program.carried)
    assert torch.equal(program.generate(prompt, 12), generate(simulation, prompt, 12))


def test_attention_that_cannot_go_on_is_named(mamba_ssm: ModuleType) -> None:
    model = language_model(mamba_ssm, "Mamba2", **HYBRID, attn_cfg={**ATTENTION, "causal": False})
    with pytest.raises(MqAoError, match="attention of mamba_ssm that is not causal is not supported"):
        export_with_states(model)
