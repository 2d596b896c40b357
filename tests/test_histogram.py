"""Ranges by histogram: as torchao's observer finds them, from values that are counted another way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.pt2e import HistogramObserver as Reference

from mq_ao.compat.observers import HistogramObserver

DRAWN = st.tuples(st.integers(0, 2**16), st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(1, 70_000))


@given(DRAWN)
@settings(max_examples=15, deadline=None)
def test_histogram_and_range_are_those_of_torchao(drawn: tuple[int, list[float], int]) -> None:
    seed, spreads, size = drawn
    generator = torch.Generator().manual_seed(seed)
    ours, reference = (kind(quant_min=0, quant_max=127) for kind in (HistogramObserver, Reference))
    for spread in spreads:
        values = torch.randn(2, size, generator=generator) * spread
        assert ours(values) is values
        reference(values)
    # A value within rounding of an edge may be counted on its other side, and a wider range then moves it on.
    moved = (ours.histogram - reference.histogram).abs().sum() / 2
    assert moved <= 1 + 1e-3 * reference.histogram.sum()
    assert ours.histogram.sum() == pytest.approx(float(reference.histogram.sum()))
    assert torch.equal(ours.min_val, reference.min_val) and torch.equal(ours.max_val, reference.max_val)
    # The search for a range stops at the first bin that does not help, so a value that moved can shift it by bins.
    scale, _ = ours.calculate_qparams()
    torch.testing.assert_close(scale, reference.calculate_qparams()[0], rtol=5e-3, atol=0)


@pytest.mark.parametrize("first", [torch.zeros(3), torch.full((2, 2), 5.0), torch.empty(0)])
def test_tensors_of_one_value_or_none_are_as_for_torchao(first: torch.Tensor) -> None:
    ours, reference = HistogramObserver(), Reference()
    for values in (first, torch.linspace(-1, 7, 1000)):
        ours(values)
        reference(values)
    torch.testing.assert_close(ours.histogram, reference.histogram, rtol=0, atol=1)
    assert ours.calculate_qparams() == reference.calculate_qparams()


@pytest.mark.filterwarnings("ignore:torch.inf detected")
def test_infinity_is_ignored_as_by_torchao() -> None:
    ours, reference = HistogramObserver(), Reference()
    for values in (torch.tensor([1.0, 2.0, torch.inf]), torch.linspace(0, 3, 100)):
        ours(values)
        reference(values)
    assert torch.equal(ours.max_val, reference.max_val) and float(ours.max_val) == 3
