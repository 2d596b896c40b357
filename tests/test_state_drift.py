"""The script that shows how rounded states drift."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mq_ao.models import Mamba2Config, MambaLM, language_model

from .conftest import tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import state_drift
from state_drift import Cast, Rounding


def test_rows_are_the_model_with_its_states_rounded_after_every_token(tiny: MambaLM) -> None:
    text = tokens(41)
    largest = state_drift.largest_states(tiny, text)
    away = Rounding(lambda steps: 5 * torch.trunc(steps), 1.0, bits=4)  # so far away that even a random model minds
    found = state_drift.drift(tiny, text, largest, {"none": Cast(torch.float32), "away": away}, window=20)
    assert [window.end for window in found["none"]] == [20, 40]
    # Two rows of one batch, in float32.
    assert all(abs(window.divergence) < 1e-6 for window in found["none"])
    runs = [tiny.initial_states(1) for _ in range(2)]
    costs = torch.zeros(2)
    with torch.no_grad():
        for at in range(20):
            outputs = [tiny(text[None, at : at + 1], *states) for states in runs]
            costs += torch.stack([-logits[0, 0].log_softmax(-1)[text[at + 1]] for logits, _, _ in outputs])
            runs = [states for _, *states in outputs]
            runs[1][1] = away(runs[1][1], away.scale(largest)[:, None])
    # Sums of 20 costs of 6 nats in float32.
    assert found["away"][0].loss == pytest.approx((costs[1] - costs[0]).item() / 20, abs=3e-6)
    assert abs(found["away"][0].loss) > 1e-4 and found["away"][0].divergence > 0


def test_scales(tiny: MambaLM) -> None:
    largest = torch.rand(2, 8, 4) + 0.1
    assert torch.equal(Rounding(torch.round, 2.0).scale(largest), 2 * largest / 127)
    assert Rounding(torch.round, 1.0, shared=1).scale(largest).shape == (2, 8, 1)
    assert torch.equal(Rounding(torch.round, 1.0, shared=2).scale(largest), largest.amax((1, 2), keepdim=True) / 127)
    scale = Rounding(torch.round, 1.0, power_of_two=True).scale(largest)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert ((scale >= largest / 127) & (scale < 2 * largest / 127)).all()


def test_mamba2_has_scales_of_heads() -> None:
    torch.manual_seed(0)
    model = language_model(Mamba2Config(vocab_size=256, d_model=32, n_layer=1, headdim=16, d_state=16)).eval()
    largest = state_drift.largest_states(model, tokens(8))
    ways = state_drift.ways(largest.dim() - 1)
    assert ways["... a scale a head"].scale(largest).shape == (1, 4, 1, 1)
    found = state_drift.drift(model, tokens(9), largest, ways, window=4)
    assert set(found) == set(ways) and all(len(windows) == 2 for windows in found.values())
