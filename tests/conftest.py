"""Tiny models and programs that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mq_ao.lowering.inductor import InductorProgram

import mq_ao
from mq_ao.api import QuantizedProgram
from mq_ao.models import MambaConfig, MambaLM

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
VOCAB = 256


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of the tiny model."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tiny() -> MambaLM:
    """A random two-layer model, in eval mode; tests must not change it."""
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=64, n_layer=2)).eval()


@pytest.fixture(scope="session")
def calibration() -> list[torch.Tensor]:
    """Token ids that no test evaluates on."""
    return [tokens(2, 32, seed=seed) for seed in range(100, 104)]


@pytest.fixture(scope="session", params=["rtn-w8a8", "rtn-w8a8-dynamic"])
def quantized(request: pytest.FixtureRequest, tiny: MambaLM, calibration: list[torch.Tensor]) -> QuantizedProgram:
    """The tiny model quantized by each recipe."""
    return mq_ao.quantize(tiny, calibration, request.param)


@pytest.fixture(scope="session")
def program(quantized: QuantizedProgram) -> InductorProgram:
    """The quantized tiny model, compiled."""
    return quantized.lower("inductor")
