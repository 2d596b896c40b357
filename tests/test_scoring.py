"""Scores of continuations, whose context is read once, against whole sequences; and texts that end at a string."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.scoring import Score, Scorer
from mq_ao.writing import until
from tests.test_capture_states import captured, ids_of
from tests.test_capture_transformers import VOCAB

tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@functools.cache
def runs() -> dict[str, Any]:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=VOCAB, d_model=16, n_layer=2, d_state=4)).eval()
    program = mq_ao.quantize(model, [ids_of(4, 16)], "mambaquant-w8a8", backend="cuda").lower()
    return {"model": model, "hybrid": StatefulGraph(captured("Bamba")[1]), "integers": program}


def directly(run: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = run(torch.tensor([context + continuation]))[0][0].double()
    predicted = logits[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    log_p = predicted.log_softmax(-1)[range(len(targets)), targets]
    return log_p.sum().item(), bool((predicted.argmax(-1) == targets).all())


@settings(max_examples=30, deadline=None)
@given(context=tokens, continuations=st.lists(tokens, min_size=1, max_size=5), rows=st.sampled_from([1, 2, 16]))
@pytest.mark.parametrize("kind", ["model", "hybrid", "integers"])
@pytest.mark.parametrize("way", ["states", "states nobody knows", "no states"])
def test_scores_are_those_of_whole_sequences(
    kind: str, way: str, context: list[int], continuations: list[list[int]], rows: int
) -> None:
    run = runs()[kind]
    states = run.carried if way == "states" else None
    found = Scorer(run, states, way != "no states", rows)(context, continuations)
    for score, continuation in zip(found, continuations, strict=True):
        wanted, greedy = directly(run, context, continuation)
        # Sums in another order; of integers a step may flip at a border, which none of these does.
        assert score.log_likelihood == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert score.greedy == greedy


def test_a_greedy_continuation_is_known() -> None:
    run = runs()["model"]
    written = run.generate(torch.tensor([[3, 4]]), 4)[0, 2:].tolist()
    other = [*written[:3], (written[3] + 1) % VOCAB]
    scores = Scorer(run, run.carried)([3, 4], [other, written])
    assert [score.greedy for score in scores] == [False, True]


def test_a_context_is_read_once() -> None:
    model, read = runs()["model"], []

    def run(ids: torch.Tensor, *states: Any) -> Any:
        read.append(tuple(ids.shape))
        return model(ids, *states)

    Scorer(run, model.carried, rows=2)([1, 2, 3, 4], [[5], [6, 7, 8], [6], [6, 7]])
    assert read == [(1, 4), (2, 2)], "those of one token need no call of their own"


def test_nonsense_is_refused() -> None:
    run = runs()["model"]
    for context, continuations in (([], [[1]]), ([1], [[]])):
        with pytest.raises(MqAoError, match="have at least one token each"):
            Scorer(run, run.carried)(context, continuations)

    def broken(ids: torch.Tensor, *states: Any) -> Any:
        return torch.full((*ids.shape, VOCAB), torch.nan), *states

    with pytest.raises(MqAoError, match="hold NaN or Inf"):
        Scorer(broken, None)([1], [[2]])
    assert Scorer(run, run.carried)([1], []) == []
    assert isinstance(Scorer(run, run.carried)([1], [[2]])[0], Score)


@given(
    pieces=st.lists(st.text("ab\n", max_size=3), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3),
)
def test_texts_end_at_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert "".join(until(pieces, stops)) == text[: min(places, default=len(text))]


def test_text_is_handed_on_as_soon_as_it_is_certain() -> None:
    seen: list[str] = []

    def pieces() -> Any:
        for piece in ("one", " tw", "o", " END", " never"):
            yield piece
            seen.append(piece)

    stream = until(pieces(), [" END"])
    assert next(stream) == "one" and next(stream) == " tw"
    assert "".join(stream) == "o" and " never" not in seen
