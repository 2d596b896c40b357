"""`mq_ao::round_tile`: native kernel and reference against weight after weight, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.ops.round_tile import round_tile

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("native_kernels")


def operands(height: int, width: int, seed: int) -> dict[str, Any]:
    """Views into larger matrices, as a weight's tiles are; diagonals and what is below them hold numbers as well."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns + 2, generator=generator, dtype=F64)[:, 1:-1]

    scale = drawn(height, width).abs() + 0.1
    asked = {"inputs": 0.2 * drawn(width, width), "outputs": 0.2 * drawn(height, height)}
    return {"weight": 2 * drawn(height, width), "scale": scale, "owed": drawn(height, width), **asked}


def one_by_one(a: dict[str, Any], low: int, high: int) -> tuple[Tensor, Tensor]:
    """The definition."""
    values, errors, off = (torch.zeros_like(a["weight"]) for _ in range(3))
    for row in range(len(values)):
        above = a["outputs"][:row, row]
        for column in range(values.shape[1]):
            before = a["inputs"][:column, column]
            owing = a["owed"][row, column] + (errors[row, :column] * before).sum()
            wanted = a["weight"][row, column] - (above * off[:row, column]).sum() - owing
            values[row, column] = (wanted / a["scale"][row, column]).round().clamp(low, high)
            errors[row, column] = wanted - values[row, column] * a["scale"][row, column]
            off[row, column] = owing + errors[row, column]
    return values, errors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 20), st.sampled_from([(-8, 7), (-127, 127), (0, 0)]), st.integers(0, 2**31))
@example(128, 128, (-8, 7), 0)
@example(5, 128, (-127, 127), 1)
def test_it_is_its_definition(height: int, width: int, limits: tuple[int, int], seed: int) -> None:
    a = operands(height, width, seed)
    if height * width > 640:  # as damped moments are: what errors ask for does not grow from weight to weight
        a |= {"inputs": a["inputs"] / 8, "outputs": a["outputs"] / 8}
    wanted = one_by_one(a, *limits)
    for run in (round_tile, round_tile.reference):
        values, errors = run(**a, low=limits[0], high=limits[1])
        assert values.is_contiguous() and errors.is_contiguous()
        assert torch.equal(values, wanted[0])
        # Sums of at most 256 products, in other orders, of what grows to a few thousand here.
        torch.testing.assert_close(errors, wanted[1], rtol=1e-9, atol=1e-9)


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e300]], dtype=F64)
    none, wide = torch.zeros_like(weight), torch.zeros(6, 6, dtype=F64)
    values, errors = round_tile(weight, torch.ones_like(weight), none, wide, none[:, :1], -8, 7)
    assert values.tolist() == [[0, 2, 2, 0, -2, 7]]
    assert torch.equal(errors, weight - values)


def test_it_is_an_operator() -> None:
    torch.library.opcheck(torch.ops.mq_ao.round_tile.default, (*operands(3, 5, 0).values(), -8, 7))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(3, dtype=F64)}, "round_tile takes a float64 matrix, not torch.float64 .3,"),
        ({"weight": torch.zeros(3, 5)}, "takes a float64 matrix, not torch.float32"),
        ({"scale": torch.ones(3, 1, dtype=F64)}, "scale must be float64 .3, 5., it is torch.float64 .3, 1."),
        ({"owed": torch.zeros(3, 5).int()}, "owed must be float64 .3, 5., it is torch.int32"),
        ({"inputs": torch.zeros(3, 3, dtype=F64)}, "inputs must be float64 .5, 5."),
        ({"outputs": torch.zeros(5, 5, dtype=F64)}, "outputs must be float64 .3, 3."),
        ({"low": 8}, "the integers go from 8 to 7"),
    ],
)
def test_bad_operands(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        round_tile(**{**operands(3, 5, 0), "low": -8, "high": 7, **changed})
