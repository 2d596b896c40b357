"""Integer grids of weights: nearest integers, scales by row and by group, and the clipping search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.quantizer.weights import QuantizedWeight, round_to_grid

drawn = settings(max_examples=60, deadline=None)
bit_widths = st.sampled_from([3, 4, 8])
group_sizes = st.sampled_from([None, 1, 3, 32, 64, 128])
seeds = st.integers(0, 2**31)
LIMITS = {3: (-4, 3), 4: (-8, 7), 8: (-127, 127)}


def matrix(rows: int, inputs: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian, with some inputs ten times as large as the others."""
    gen = torch.Generator().manual_seed(seed)
    factor = 1 + 9 * (torch.rand(inputs, generator=gen) < 0.1)
    return (torch.randn(rows, inputs, generator=gen) * factor).to(dtype)


def scale_of(quantized: QuantizedWeight, row: int, column: int) -> float:
    """By the definition of a group, one weight at a time."""
    if quantized.group_size is None:
        return float(quantized.scale[row])
    return float(quantized.scale[row, column // quantized.group_size])


def squared_error(weight: Tensor, quantized: QuantizedWeight, importance: Tensor) -> Tensor:
    """(out, groups) float64, the last group filled up with zeros."""
    inputs = weight.shape[1]
    size = quantized.group_size or inputs
    error = (weight.double() - quantized.dequantized().double()).square() * importance.double()
    return torch.nn.functional.pad(error, (0, -inputs % size)).reshape(len(weight), -1, size).sum(-1)


@drawn
@given(st.integers(1, 9), st.integers(1, 150), bit_widths, group_sizes, st.booleans(), st.booleans(), seeds)
def test_every_value_is_the_nearest_integer_of_its_scale(
    rows: int, inputs: int, bits: int, group_size: int | None, search: bool, half: bool, seed: int
) -> None:
    weight = matrix(rows, inputs, seed, torch.bfloat16 if half else torch.float32)
    quantized = round_to_grid(weight, bits, group_size, search)
    low, high = LIMITS[bits]
    assert quantized.values.dtype == torch.int8
    assert quantized.scale.dtype == quantized.dequantized().dtype == torch.float32
    groups = () if group_size is None else (-(-inputs // group_size),)
    assert quantized.scale.shape == (rows, *groups)
    assert (quantized.bits, quantized.group_size) == (bits, group_size)
    dequantized = quantized.dequantized()
    for row in range(rows):
        for column in range(inputs):
            scale = scale_of(quantized, row, column)
            value = int(quantized.values[row, column])
            assert value == min(max(round(float(weight[row, column]) / scale), low), high)
            # The float32 product of an int8 and a float32 is rounded once.
            assert float(dequantized[row, column]) == float(torch.tensor(value * scale, dtype=torch.float32))


@drawn
@given(st.integers(1, 9), st.integers(1, 150), group_sizes, seeds)
def test_int8_is_symmetric_and_within_half_a_step(rows: int, inputs: int, group_size: int | None, seed: int) -> None:
    weight = matrix(rows, inputs, seed)
    quantized = round_to_grid(weight, 8, group_size)
    steps = torch.tensor([[scale_of(quantized, r, c) for c in range(inputs)] for r in range(rows)])
    # Half a step; the scale's and the product's float32 roundings move a value of up to 127 steps by 127 * 2^-23.
    assert ((weight - quantized.dequantized()).abs() <= steps * (0.5 + 2e-5)).all()
    assert torch.equal(round_to_grid(-weight, 8, group_size).values, -quantized.values)


@drawn
@given(st.integers(1, 9), st.integers(1, 150), bit_widths, group_sizes, st.booleans(), seeds)
def test_search_never_raises_the_error_it_minimises(
    rows: int, inputs: int, bits: int, group_size: int | None, weighted: bool, seed: int
) -> None:
    weight = matrix(rows, inputs, seed)
    importance = matrix(1, inputs, seed + 1)[0].square() if weighted else torch.ones(inputs)
    found = round_to_grid(weight, bits, group_size, True, importance if weighted else None)
    plain = squared_error(weight, round_to_grid(weight, bits, group_size), importance)
    # Candidates are compared in float32, on values of up to 127 steps that round at 2^-24 of themselves: an error that
    # is as small as this rounding cannot be told from another.
    rounding = (importance.max() * weight.abs().amax().square()).double() * inputs * 2.0**-44
    assert (squared_error(weight, found, importance) <= plain * (1 + 1e-4) + rounding).all()


def test_search_clips_where_that_pays() -> None:
    weight = matrix(64, 512, 0)
    ones = torch.ones(512)
    plain = squared_error(weight, round_to_grid(weight, 4), ones).sum()
    found = squared_error(weight, round_to_grid(weight, 4, search=True), ones).sum()
    assert found < 0.9 * plain


def test_search_heeds_importance() -> None:
    weight = torch.full((1, 65), 0.1)
    weight[0, 0] = 1.0
    outlier, others = torch.zeros(65), torch.ones(65)
    outlier[0], others[0] = 1.0, 0.0
    keeps = round_to_grid(weight, 4, None, True, outlier).dequantized()
    gives_up = round_to_grid(weight, 4, None, True, others).dequantized()
    assert abs(keeps[0, 0] - 1) < 0.01 < abs(gives_up[0, 0] - 1)
    assert abs(gives_up[0, 1] - 0.1) < abs(keeps[0, 1] - 0.1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 3e38])
def test_any_magnitude_has_finite_scales(bits: int, search: bool, size: float) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.25]]) * size
    quantized = round_to_grid(weight, bits, 2, search)
    assert torch.equal(quantized.scale[0], torch.ones(2))
    assert not quantized.values[0].any()
    assert (quantized.scale > 0).all()
    # A step of int4 is an eighth of the largest weight, one of int3 a quarter, and the smallest scale is float32's
    # smallest normal number.
    off = (quantized.dequantized().double() - weight.double()).abs().max()
    assert off <= max(size / (3 if bits == 3 else 7), torch.finfo(torch.float32).tiny)


def test_many_rows_are_quantized_as_each_alone() -> None:
    weight = matrix(1600, 700, 5)
    importance = torch.rand(700)
    quantized = round_to_grid(weight, 4, 128, True, importance)
    for row in (0, 1496, 1497, 1599):
        alone = round_to_grid(weight[row : row + 1], 4, 128, True, importance)
        assert torch.equal(alone.values[0], quantized.values[row])
        assert torch.equal(alone.scale[0], quantized.scale[row])


@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "importance", "message"),
    [
        (torch.ones(2, 3), 2, None, None, "weights of 2 bits"),
        (torch.ones(3), 4, None, None, r"a weight is \(3,\)"),
        (torch.ones(0, 3), 4, None, None, r"a weight is \(0, 3\)"),
        (torch.ones(2, 3, dtype=torch.int8), 4, None, None, "torch.int8"),
        (torch.tensor([[1.0, torch.nan]]), 4, None, None, "NaN or Inf"),
        (torch.tensor([[1.0, torch.inf]]), 8, None, None, "NaN or Inf"),
        (torch.ones(2, 3), 4, 0, None, "the group size is 0"),
        (torch.ones(2, 3), 4, None, torch.ones(2), r"importance is \(2,\)"),
        (torch.ones(2, 3), 4, None, torch.tensor([1.0, -1.0, 1.0]), "importance holds"),
        (torch.ones(2, 3), 4, None, torch.tensor([1.0, torch.nan, 1.0]), "importance holds"),
    ],
)
def test_bad_input(weight: Tensor, bits: int, group_size: int | None, importance: Tensor | None, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        round_to_grid(weight, bits, group_size, True, importance)
