"""GPTQ against the textbook form of its algorithm, and against rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.quantizer.gptq import gptq, output_error
from mq_ao.quantizer.weights import QuantizedWeight, round_to_grid

drawn = settings(max_examples=20, deadline=None)
bit_widths = st.sampled_from([4, 8])
group_sizes = st.sampled_from([None, 5, 64])
seeds = st.integers(0, 2**31)
LIMITS = {4: (-8, 7), 8: (-127, 127)}


def layer(
    rows: int, inputs: int, seed: int, tokens: int | None = None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that are mixtures of `rank` sources of unlike size."""
    gen = torch.Generator().manual_seed(seed)
    rank = rank or inputs
    sources = torch.randn(tokens or 4 * inputs, rank, generator=gen) * torch.logspace(0, -1.5, rank)
    x = (sources @ torch.randn(rank, inputs, generator=gen)).double()
    return torch.randn(rows, inputs, generator=gen), x.t() @ x / len(x)


def rounding(weight: Tensor, moment: Tensor, bits: int, group_size: int | None, search: bool) -> QuantizedWeight:
    """What `gptq` has to beat: the same scales, without making up for errors."""
    return round_to_grid(weight, bits, group_size, search, moment.diagonal() if search else None)


def textbook(weight: Tensor, moment: Tensor, quantized: QuantizedWeight, bits: int, act: bool) -> Tensor:
    """One column at a time, with the inverse of the remaining inputs' moment taken anew for each (equation 2)."""
    damped = moment + torch.eye(len(moment)) * 0.01 * moment.diagonal().mean()
    left = torch.arange(len(moment))
    if act:
        left = torch.argsort(moment.diagonal(), descending=True, stable=True)
    weight = weight.double().clone()
    values = torch.zeros_like(quantized.values)
    while len(left):
        inverse = torch.linalg.inv(damped[left][:, left])
        j = int(left[0])
        scale = quantized.scale if quantized.group_size is None else quantized.scale[:, j // quantized.group_size]
        integers = torch.round(weight[:, j] / scale.double()).clamp(*LIMITS[bits])
        values[:, j] = integers.to(torch.int8)
        error = (weight[:, j] - integers * scale.double()) / inverse[0, 0]
        weight[:, left] -= torch.outer(error, inverse[0])
        left = left[1:]
    return values


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 7, 128, 129, 140]), bit_widths, group_sizes, st.booleans(), seeds)
def test_agrees_with_the_algorithm_one_column_at_a_time(
    rows: int, inputs: int, bits: int, group_size: int | None, act: bool, seed: int
) -> None:
    weight, moment = layer(rows, inputs, seed)
    found = gptq(weight, moment, bits, group_size, act_order=act)
    want = QuantizedWeight(textbook(weight, moment, found, bits, act), found.scale, group_size)
    rounded = rounding(weight, moment, bits, group_size, True)
    # A row stays rounded only where the algorithm does not help.
    helps = output_error(weight, want, moment) < output_error(weight, rounded, moment)
    assert torch.equal(found.values, torch.where(helps[:, None], want.values, rounded.values))


# The greedy choice alone is worse than rounding in an eighth of these rows.
@example(50, 10, 40, 4, None, False, True, 0)
@drawn
@given(
    st.integers(1, 20),
    st.integers(1, 150),
    st.integers(1, 300),
    bit_widths,
    group_sizes,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_output_error_is_never_above_roundings(
    rows: int, inputs: int, tokens: int, bits: int, group_size: int | None, act: bool, search: bool, seed: int
) -> None:
    # Fewer tokens than inputs too: the moment is singular then.
    weight, moment = layer(rows, inputs, seed, tokens)
    found = gptq(weight, moment, bits, group_size, act_order=act, search=search)
    rounded = rounding(weight, moment, bits, group_size, search)
    assert torch.equal(found.scale, rounded.scale)
    assert (found.bits, found.group_size) == (bits, group_size)
    low, high = LIMITS[bits]
    assert found.values.dtype == torch.int8
    assert found.values.min() >= low
    assert found.values.max() <= high
    assert (output_error(weight, found, moment) <= output_error(weight, rounded, moment)).all()


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_strong_correlation_is_made_use_of(bits: int, group_size: int | None, search: bool, act: bool) -> None:
    weight, moment = layer(64, 150, 1, rank=30)
    found = output_error(weight, gptq(weight, moment, bits, group_size, act_order=act, search=search), moment)
    rounded = output_error(weight, rounding(weight, moment, bits, group_size, search), moment)
    assert found.sum() < 0.25 * rounded.sum()
    assert (found < rounded).all()


def test_output_error_is_the_mean_square_over_tokens() -> None:
    gen = torch.Generator().manual_seed(2)
    x, weight = torch.randn(50, 9, generator=gen).double(), torch.randn(4, 9, generator=gen)
    quantized = round_to_grid(weight, 4, 4)
    change = x @ (weight.double() - quantized.dequantized().double()).t()
    found = output_error(weight, quantized, x.t() @ x / 50)
    # Two orders of summing 50 and 9 float64 numbers.
    torch.testing.assert_close(found, change.square().mean(0), rtol=1e-12, atol=0)


@drawn
@given(st.integers(1, 20), st.integers(1, 150), bit_widths, group_sizes, st.booleans(), seeds)
def test_independent_inputs_are_rounded_in_any_order(
    rows: int, inputs: int, bits: int, group_size: int | None, act: bool, seed: int
) -> None:
    weight, moment = layer(rows, inputs, seed)
    diagonal = moment.diagonal().diag()
    found = gptq(weight, diagonal, bits, group_size, act_order=act)
    assert torch.equal(found.values, rounding(weight, diagonal, bits, group_size, True).values)


def test_inputs_that_were_always_zero_are_rounded() -> None:
    weight, moment = layer(8, 140, 3)
    dead = torch.arange(140) % 7 == 0
    moment[dead] = 0
    moment[:, dead] = 0
    found, rounded = gptq(weight, moment, 4), rounding(weight, moment, 4, None, True)
    assert torch.equal(found.values[:, dead], rounded.values[:, dead])
    assert not torch.equal(found.values, rounded.values)
    nothing = gptq(weight, torch.zeros(140, 140), 4)
    assert torch.equal(nothing.values, round_to_grid(weight, 4).values)


def test_the_moment_counts_up_to_a_factor() -> None:
    weight, moment = layer(8, 100, 4)
    # A power of two: every intermediate number is scaled exactly.
    assert torch.equal(gptq(weight, moment, 4, 32).values, gptq(weight, moment * 2.0**20, 4, 32).values)


def test_half_precision_weights_are_those_numbers() -> None:
    weight, moment = layer(8, 100, 5)
    half = weight.bfloat16()
    assert torch.equal(gptq(half, moment, 4).values, gptq(half.float(), moment, 4).values)


@pytest.mark.parametrize(
    ("weight", "moment", "options", "message"),
    [
        (torch.ones(2, 3), torch.eye(2), {}, r"the weight is \(2, 3\) and the second moment \(2, 2\)"),
        (torch.ones(3), torch.eye(3), {}, r"the weight is \(3,\)"),
        (torch.ones(2, 3), torch.eye(3) * torch.nan, {}, "second moment holds NaN"),
        (torch.tensor([[1.0, torch.nan]]), torch.eye(2), {}, "a weight holds NaN"),
        (torch.ones(2, 3), torch.eye(3), {"damping": -1.0}, "the damping is -1.0"),
        (torch.ones(2, 3), torch.eye(3), {"damping": float("nan")}, "the damping is nan"),
        (torch.ones(2, 3), torch.ones(3, 3), {"damping": 0.0}, "raise the damping"),
        (torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), {}, "not positive definite"),
        (torch.ones(2, 3), torch.eye(3), {"bits": 5}, "weights of 5 bits"),
        (torch.ones(2, 3), torch.eye(3), {"group_size": -1}, "the group size is -1"),
    ],
)
def test_bad_input(weight: Tensor, moment: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        gptq(weight, moment, **{"bits": 4, **options})  # type: ignore[arg-type]
