"""Padding that a mask tells of is left out, and a mask that does not tell is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.calibration.padding import unpadded
from mq_ao.lowering.language_graphs import states_of
from mq_ao.models import MambaLM
from tests.conftest import tokens

IDS = tokens(2, 6)
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=6), st.data())
def test_padding_is_cut_from_whatever_has_the_shape_of_the_mask(runs: list[tuple[int, int]], data: Any) -> None:
    width = max(1, *(start + count for start, count in runs)) + data.draw(st.integers(0, 2))
    mask = torch.zeros(len(runs), width, dtype=data.draw(st.sampled_from([torch.int64, torch.bool])))
    for row, (start, count) in enumerate(runs):
        mask[row, start : start + count] = 1
    ids = torch.arange(mask.numel()).view(mask.shape)
    inputs = {"input_ids": ids, "attention_mask": mask, "x": ids[..., None].float(), "row": ids[:, 0], "scale": 2.0}
    if not mask.any():
        with pytest.raises(MqAoError):
            list(unpadded(inputs))
        return
    seen = []
    for part in unpadded(inputs):
        assert part["attention_mask"].all()
        assert part["input_ids"].shape == part["attention_mask"].shape
        assert torch.equal(part["x"], part["input_ids"][..., None].float())
        assert part["scale"] == 2.0
        assert part["row"].shape == part["input_ids"].shape[:1]
        seen += part["input_ids"].flatten().tolist()
    assert sorted(seen) == ids[mask != 0].tolist()


def test_what_goes_by_position_is_cut_as_the_tokens_are() -> None:
    columns = torch.arange(6)
    one, other = unpadded(
        {
            "input_ids": IDS,
            "attention_mask": MASK.flip(1),  # on the left
            "position_ids": columns[None],
            "kinds": columns.expand(2, -1),
            "nested": [{"x": torch.ones(2, 6, 3)}],
            "pixels": torch.ones(2, 3, 8, 8),
            "weights": torch.ones(16),
        }
    )
    assert [part["input_ids"].shape for part in (one, other)] == [(1, 6), (1, 3)]
    assert other["position_ids"].tolist() == other["kinds"].tolist() == [[3, 4, 5]]
    assert other["nested"][0]["x"].shape == (1, 3, 3)
    assert other["pixels"].shape == (1, 3, 8, 8)
    assert other["weights"].shape == (16,)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": MASK[:1]}, r"is of shape \(1, 6\) beside inputs of \(2, 6\)"),
        ({"attention_mask": torch.ones(2, 7)}, r"is of shape \(2, 7\) beside inputs of \(2, 6\)"),
        ({"attention_mask": MASK[0]}, r"is of shape \(6,\): it is \(batch, length\), 1 at tokens"),
        ({"attention_mask": (MASK - 1) * 1e9}, "holds other values than 0 and 1"),
        ({"attention_mask": True}, "attention_mask is a bool"),
        ({"attention_mask": torch.zeros(2, 6)}, "is 0 everywhere: give at least one token"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]] * 2)}, "is 0 between tokens of one sequence"),
        ({"attention_mask": MASK, "f": torch.ones(2, 6)}, r"f of shape \(2, 6\) does not tell which of its axes"),
        ({"attention_mask": MASK, "state": torch.ones(2, 2, 3)}, r"state of shape \(2, 2, 3\) does not tell"),
        ({"attention_mask": MASK, "state": torch.ones(5, 2, 3)}, r"state of shape \(5, 2, 3\) does not tell"),
    ],
)
def test_masks_and_inputs_that_do_not_tell_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        list(unpadded({"input_ids": IDS, **inputs}))


def test_masks_of_more_axes_are_the_models_own(tiny: MambaLM) -> None:
    inputs = {"input_ids": IDS, "attention_mask": MASK[:, None, None]}
    (part,) = unpadded(inputs)
    assert part["attention_mask"] is inputs["attention_mask"]
    with pytest.raises(MqAoError, match=r"attention_mask is of shape \(2, 1, 1, 6\): MambaLM has no use for one"):
        mq_ao.quantize(tiny, [inputs])


def test_without_padding_nothing_is_cut() -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones(2, 6), "f": torch.ones(2, 6), "state": torch.ones(2, 2, 3)}
    (part,) = unpadded(inputs)
    assert all(part[name] is value for name, value in inputs.items())


@pytest.mark.parametrize("kind", [int, float, bool])
def test_masks_of_one_row_of_a_data_set(tiny: MambaLM, kind: type) -> None:
    row = {"input_ids": [1, 2, 3, 0], "attention_mask": [kind(1), kind(1), kind(1), kind(0)]}
    assert mq_ao.quantize(tiny, [row], "rtn-w8a8").report().tokens == 3


def their_model() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def padded(side: str) -> dict[str, Tensor]:
    """Two sequences, of 7 and 4 tokens, as a tokenizer pads them: with token 0."""
    ids, mask = tokens(2, 7, seed=3), torch.ones(2, 7, dtype=torch.int64)
    place = slice(4, None) if side == "right" else slice(None, 3)
    ids[1, place], mask[1, place] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(batch: dict[str, Tensor]) -> list[Tensor]:
    return [row[mask != 0][None] for row, mask in zip(*batch.values(), strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "mambaquant-w8a8"])
def test_padding_changes_nothing_in_a_language_model(tiny: MambaLM, side: str, recipe: str) -> None:
    padding = mq_ao.quantize(tiny, [padded(side)], recipe)
    without = mq_ao.quantize(tiny, alone(padded(side)), recipe)
    ids = tokens(2, 9, seed=5)
    states = tiny.initial_states(2)
    assert torch.equal(padding.converted(ids, *states)[0], without.converted(ids, *states)[0])
    assert (padding.report().batches, padding.report().tokens) == (1, 11)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_transformers_models(side: str) -> None:
    batch = padded(side)
    padding = mq_ao.quantize(their_model(), [batch], "rtn-w8a8")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in alone(batch)]
    without = mq_ao.quantize(their_model(), rows, "rtn-w8a8")
    given = (tokens(3, 9, seed=5), *states_of(padding.converted).examples(3, 0))
    assert torch.equal(padding.converted(*given)[0], without.converted(*given)[0])
