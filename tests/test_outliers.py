"""The script that says how large a model's outliers are."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from mq_ao.models import Mamba2Config, MambaLM, language_model

from .conftest import tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import outliers

from mq_ao.statistics.accumulators import Accumulator
from mq_ao.statistics.channels import ChannelStatistics

STATES, IN_PROJ, OUT_PROJ = "states h, in h C", "input of in_proj", "input of out_proj"


def statistics(x: torch.Tensor) -> ChannelStatistics:
    item = Accumulator(covariance=False, quantiles=True)
    item.update(x, "x")
    item.finish()
    return ChannelStatistics(item.count, item.low, item.high, item.total, item.squares, item.moments, item.histogram)


def test_figures_are_those_of_the_values() -> None:
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    found = outliers.outliers_of(statistics(x))
    # Bins an eighth of an octave wide: the fourth moment is off by a percent, and a normal distribution's is 3.
    assert found.kurtosis == pytest.approx(0.0, abs=0.1) and found.ratio < 1.2
    x[:, 3] *= 100
    found = outliers.outliers_of(statistics(x))
    assert found.peak == x.abs().max() and found.ratio == pytest.approx(100, rel=0.2)
    exact = (x.double() ** 4).mean() / (x.double() ** 2).mean() ** 2 - 3
    assert found.kurtosis == pytest.approx(exact.item(), rel=0.05)


def test_planted_outliers_are_found_in_their_layer(tiny: MambaLM) -> None:
    before = outliers.measure(tiny, [tokens(2, 32)])
    assert {what: len(layers) for what, layers in before.items()} == dict.fromkeys((IN_PROJ, STATES, OUT_PROJ), 2)
    planted = copy.deepcopy(tiny)
    with torch.no_grad():
        planted.backbone.layers[1].norm.weight[5] *= 50
    after = outliers.measure(planted, [tokens(2, 32)])
    assert after[IN_PROJ][0] == before[IN_PROJ][0]
    assert after[IN_PROJ][1].ratio > 10 * before[IN_PROJ][1].ratio
    assert after[IN_PROJ][1].kurtosis > 10


def test_mamba2_has_no_states_to_look_at() -> None:
    torch.manual_seed(0)
    model = language_model(Mamba2Config(vocab_size=256, d_model=32, n_layer=1, headdim=16, d_state=16)).eval()
    found = outliers.measure(model, [tokens(2, 32)])
    assert set(found) == {IN_PROJ, OUT_PROJ}
