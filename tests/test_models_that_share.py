"""Models whose parts share weights or have awkward sizes: captured exactly, quantized, and equal to the simulation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao.graph import match
from mq_ao.lowering import inductor
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.mamba import MambaMixer
from tests.conftest import tokens

CONFIG = MambaConfig(vocab_size=64, d_model=16, n_layer=1, d_state=8)
# A value on the border between two integers may round to either side (as in test_lowering).
FLIPPED_STEP = 5e-3


class ReverseComplement(nn.Module):
    """One mixer on a sequence and on its reverse complement, channels and positions turned around (Caduceus)."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.norm = MambaMixer(CONFIG), nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        there = self.mixer(self.norm(x))[0]
        back = self.mixer(self.norm(x.flip(-2, -1)))[0].flip(-2, -1)
        return x + there + back


class Tied(nn.Module):
    """Two mixers with the same in_proj and out_proj, and a third that is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = MambaMixer(CONFIG), MambaMixer(CONFIG), nn.RMSNorm(16)
        self.second.in_proj.weight, self.second.out_proj.weight = self.first.in_proj.weight, self.first.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        for mixer in (self.first, self.second, self.first):
            x = x + mixer(self.norm(x))[0]
        return x


class Video(nn.Module):
    """Patches of (batch, 1, frames, height, width) by a Conv3d, a class token in front, its output the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, 16, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.mixer, self.norm, self.head = MambaMixer(CONFIG), nn.RMSNorm(16), nn.Linear(16, 3)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patches(video).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.token.expand(x.shape[0], -1, -1)], dim=1)
        x = x + self.mixer(self.norm(x))[0]
        return self.head(x[:, -1])


class OneToken(nn.Module):
    """A vector a sequence: a block of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.norm = MambaMixer(CONFIG), nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x)[:, None])[0][:, 0]


Case = tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], int]
CASES: dict[str, Case] = {
    "reverse complement": (ReverseComplement, (2, 9, 16), (3, 5, 16), 2),
    "tied": (Tied, (2, 9, 16), (1, 4, 16), 3),
    "video": (Video, (2, 1, 3, 4, 4), (3, 1, 3, 4, 4), 1),
    "one token": (OneToken, (2, 16), (5, 16), 1),
}


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "mambaquant-w8a8", "mambaquant-w4a8"])
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_matched_and_integers_equal_the_simulation(name: str, recipe: str) -> None:
    build, shape, other, blocks = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    graph = mq_ao.export(model, (batches[0],)).module(check_guards=False)
    found = match(graph)
    assert (len(found.blocks), found.rejected) == (blocks, ())
    x = torch.randn(other, generator=torch.Generator().manual_seed(9))
    quantized = mq_ao.quantize(model, batches, recipe)
    lowered = inductor.rewrite(quantized.converted)
    with torch.no_grad():
        expected = model(x)
        # The same float32 operators in the same order.
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-6)
        simulated, got = quantized.converted(x), lowered.module(x)
    assert (got - simulated).norm() < FLIPPED_STEP * simulated.norm()
    # Rounding to 4 bits in groups of 64 of random weights: a few percent. A wrong tie or order gives errors of order 1.
    assert (simulated - expected).norm() < (0.2 if "w4" in recipe else 0.06) * expected.norm()
    assert sum(lowered.kernels.values()) > blocks


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "mambaquant-w4a8"])
def test_sizes_that_nothing_divides_at_four_bits(recipe: str) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=64, d_model=33, n_layer=2, d_state=7, dt_rank=1)).eval()
    batches = [tokens(2, 12, seed=seed) % 64 for seed in range(3)]
    quantized = mq_ao.quantize(model, batches, recipe)
    lowered = inductor.rewrite(quantized.converted)
    ids = tokens(3, 5, seed=7) % 64
    with torch.no_grad():
        inputs = (ids, *model.initial_states(3))
        simulated, got, expected = quantized.converted(*inputs)[0], lowered.module(*inputs)[0], model(ids)[0]
    assert (got - simulated).norm() < FLIPPED_STEP * simulated.norm()
    assert (simulated - expected).norm() < 0.3 * expected.norm()  # 4 bits, no training
