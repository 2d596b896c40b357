"""Prompts of different lengths in one batch: every row goes on as it would alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models import Mamba2Config, Mamba2LM, MambaConfig, MambaLM, Sampling
from mq_ao.models.generate import generate
from mq_ao.models.prompts import lengths
from tests.test_capture_states import captured, ids_of
from tests.test_capture_transformers import VOCAB

NEW = 6


@functools.cache
def mamba(kind: str) -> MambaLM:
    torch.manual_seed(0)
    if kind == "Mamba-2":
        shape = {"d_model": 16, "n_layer": 2, "headdim": 8, "d_state": 8}
        return Mamba2LM(Mamba2Config(vocab_size=VOCAB, **shape)).eval()
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=16, n_layer=2, d_state=4)).eval()


@functools.cache
def program(kind: str) -> Any:
    return mq_ao.quantize(mamba(kind), [ids_of(4, 16)], "mambaquant-w8a8").lower()


def padded(counts: list[int], pad: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids and mask (rows, longest), and each row alone."""
    longest = max(counts)
    ids = ids_of(len(counts), longest, seed=seed)
    mask = torch.arange(longest) >= longest - torch.tensor(counts)[:, None]
    return (
        ids.where(mask, pad),
        mask.long(),
        [ids[row : row + 1, longest - count :] for row, count in enumerate(counts)],
    )


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    pad=st.sampled_from([0, VOCAB - 1]),
)
@pytest.mark.parametrize("kind", ["Mamba", "Mamba-2"])
def test_rows_of_a_model_go_on_as_alone(kind: str, counts: list[int], seed: int, pad: int) -> None:
    ids, mask, rows = padded(counts, pad, seed)
    model = mamba(kind)
    got = model.generate(ids, NEW, attention_mask=mask)
    assert torch.equal(got[:, : ids.shape[1]], ids)
    for row, alone in enumerate(rows):
        assert torch.equal(got[row, -NEW:], model.generate(alone, NEW)[0, -NEW:])


@pytest.mark.parametrize("kind", ["Mamba", "Mamba-2"])
@pytest.mark.parametrize("counts", [[1, 5, 3, 5, 1], [2, 2], [7, 1]])
def test_rows_of_an_integer_program_go_on_as_alone(kind: str, counts: list[int]) -> None:
    ids, mask, rows = padded(counts)
    run = program(kind)
    got = run.generate(ids, NEW, attention_mask=mask)
    for row, alone in enumerate(rows):
        assert torch.equal(got[row, -NEW:], run.generate(alone, NEW)[0, -NEW:])
    assert torch.equal(torch.cat([*run.stream(ids, NEW, attention_mask=mask)], 1), got[:, -NEW:])


def test_rows_without_a_cache_go_on_as_one_batch() -> None:
    """After the prompts there is one call a token, whatever their lengths."""
    batches: list[int] = []
    model = mamba("Mamba")

    def step(ids: Tensor, *states: Any) -> Any:
        batches.append(len(ids))
        return model(ids, *states)

    ids, mask, _ = padded([1, 4, 4])
    generate(step, ids, 4, attention_mask=mask, states=model.carried)
    assert batches == [1, 2, 3, 3, 3]
    batches.clear()
    generate(step, ids, 3, attention_mask=mask)
    assert batches == [1, 2, 1, 2, 1, 2], "without a description of the states they stay apart"


@pytest.mark.parametrize("name", ["Bamba", "FalconMamba", "Zamba2"])
def test_transformers_gives_the_same_tokens(name: str) -> None:
    model, graph = captured(name)
    run = StatefulGraph(graph)
    ids, mask, rows = padded([3, 8, 5])
    got = generate(run, ids, NEW, attention_mask=mask, states=run.states)
    for row, alone in enumerate(rows):
        assert torch.equal(got[row, -NEW:], generate(run, alone, NEW)[0, -NEW:])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    assert torch.equal(got, theirs)


def test_draws_are_repeated_by_their_seed() -> None:
    ids, mask, _ = padded([2, 6, 4])
    draw = functools.partial(mamba("Mamba").generate, ids, NEW, attention_mask=mask)
    assert torch.equal(draw(Sampling(1.0, seed=3)), draw(Sampling(1.0, seed=3)))
    assert not torch.equal(draw(Sampling(1.0, seed=3)), draw(Sampling(1.0, seed=4)))


@pytest.mark.parametrize("several", [False, True])
def test_a_sequence_ends(several: bool) -> None:
    model = mamba("Mamba")
    ids, mask, rows = padded([2, 6, 4])
    free = model.generate(ids, 20, attention_mask=mask)[:, ids.shape[1] :]
    end = int(free[0, 2])
    ends = (end, VOCAB + 5) if several else end
    got = model.generate(ids, 20, Sampling(eos_token_id=ends, pad_token_id=1), attention_mask=mask)[:, ids.shape[1] :]
    longest = 0
    for row in range(len(rows)):
        found = (free[row] == end).nonzero()
        count = int(found[0]) + 1 if len(found) else 20
        longest = max(longest, count)
        assert torch.equal(got[row, :count], free[row, :count])
        assert (got[row, count:] == 1).all()
    assert got.shape[1] == longest
    one = model.generate(rows[0], 20, Sampling(eos_token_id=ends))[0]
    assert int(one[-1]) == end and len(one) < 22
    filled = model.generate(ids, 20, Sampling(eos_token_id=ends), attention_mask=mask)[0, ids.shape[1] :]
    assert set(filled[3:].tolist()) <= {end}, "without pad_token_id the end itself follows"


@pytest.mark.parametrize("integers", [False, True])
def test_padding_may_be_outside_the_vocabulary(integers: bool) -> None:
    """What a mask hides, and what fills a row that has ended, are for the caller: no model reads them."""
    run = program("Mamba") if integers else mamba("Mamba")
    ids, mask, _ = padded([2, 6, 4])
    free = run.generate(ids, 8, attention_mask=mask)[:, ids.shape[1] :]
    outside = ids.where(mask == 1, -100)
    end = int(free[0, 1])
    got = run.generate(outside, 8, Sampling(eos_token_id=end, pad_token_id=10**6), attention_mask=mask)
    assert torch.equal(got[:, : ids.shape[1]], outside)
    count = free[0].tolist().index(end) + 1
    first = got[0, ids.shape[1] :]
    assert torch.equal(first[:count], free[0, :count]) and (first[count:] == 10**6).all()
    with pytest.raises(MqAoError, match="outside the vocabulary"):
        run.generate(outside, 8)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], "row 0 of attention_mask has padding behind a token: pad prompts on the left"),
        ([[1, 1, 1], [1, 0, 1]], "row 1 of attention_mask has padding behind a token"),
        ([[1, 1, 1], [0, 0, 0]], "row 1 of the prompt is padding only"),
        ([[1, 1, 1]], r"attention_mask must be of shape \(2, 3\) like the prompt, it is of shape \(1, 3\)"),
        ([[1, 1], [1, 1]], r"it is of shape \(2, 2\)"),
        ([[1, 2, 1], [1, 1, 1]], "holds other values than 0, for padding, and 1, for tokens"),
        ([[0.5, 1, 1], [1, 1, 1]], "holds other values than 0"),
        ("left", r"must be of shape \(2, 3\) like the prompt, it is a str"),
    ],
)
def test_masks_that_say_something_else(mask: Any, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        mamba("Mamba").generate(ids_of(2, 3), 2, attention_mask=mask)


def test_masks_of_any_kind() -> None:
    ids = ids_of(2, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for kind in (mask, mask.bool(), mask.float(), mask.numpy(), mask.tolist()):
        assert lengths(ids, kind) == [2, 3]
    assert lengths(ids, None) == [3, 3]


def test_ends_are_token_ids() -> None:
    for name, value in (("eos_token_id", -1), ("eos_token_id", (1, 2.5)), ("pad_token_id", -2)):
        with pytest.raises(MqAoError, match=name):
            Sampling(**{name: value})
