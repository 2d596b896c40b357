"""Rows grow without moving, and never change for those who hold them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mq_ao.models.rows import Rows


def rows_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 90)), min_size=1, max_size=12))
def test_whoever_appends_sees_his_own_rows(steps: list[tuple[int, int]]) -> None:
    known: list[tuple[Rows, Tensor]] = [(Rows(rows_of(0, 0)), rows_of(0, 0))]
    for seed, (place, count) in enumerate(steps):
        rows, values = known[place % len(known)]  # the latest, or an earlier one a second time
        new = rows_of(count, seed)
        known.append((rows.append(new), torch.cat([values, new])))
    for rows, values in known:
        assert len(rows) == len(values)
        assert torch.equal(rows.values, values)
        assert rows.values.is_contiguous()


def test_rows_stay_where_they_are_while_there_is_room() -> None:
    first = Rows(rows_of(0, 0)).append(rows_of(40, 0))
    rows = first
    for seed in range(20):
        rows = rows.append(rows_of(1, seed))
        assert rows.values.data_ptr() == first.values.data_ptr()


def test_what_is_given_is_not_written_to() -> None:
    given = rows_of(5, 0)
    before = given.clone()
    Rows(given[:3]).append(rows_of(2, 1))
    assert torch.equal(given, before)
