"""Calibration data as people have it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mq_ao
from mq_ao import MqAoError
from mq_ao.calibration.batches import Given
from mq_ao.calibration.calls import calls
from mq_ao.calibration.padding import unpadded
from mq_ao.models import MambaLM
from tests.conftest import tokens

IDS = tokens(2, 5)


class Masked(nn.Module):
    """Takes what transformers' models take."""

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
    ) -> Tensor:
        return input_ids


class Open(nn.Module):
    """Takes whatever it is given."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return args[0]


def read(batches: Any, model: nn.Module | None = None, vocab_size: int | None = 256) -> list[Given]:
    return [(call.args, call.kwargs) for call in calls(model or Masked(), batches, vocab_size)]


def ids_of(batches: Any, model: nn.Module | None = None) -> list[list[list[int]]]:
    return [(args[0] if args else kwargs["input_ids"]).tolist() for args, kwargs in read(batches, model)]


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        (IDS,),
        [IDS],
        (IDS, None),
        {"input_ids": IDS},
        UserDict({"input_ids": IDS}),  # as BatchEncoding is
        {"input_ids": IDS, "labels": IDS, "use_cache": True, "text": ["a", "b"], "no_parameter": IDS},
        IDS.int(),
        IDS.numpy(),
        IDS.numpy().astype("int16"),
        {"input_ids": IDS.numpy()},
        {"input_ids": IDS.tolist()},
        IDS.tolist(),
        tuple(map(tuple, IDS.tolist())),
        IDS.t().contiguous().t(),
    ],
)
def test_one_batch_in_every_form(batch: Any) -> None:
    ((args, kwargs),) = read([batch])
    assert kwargs == {}
    (ids,) = args
    assert ids.dtype == torch.int64
    assert torch.equal(ids, IDS)


def test_loaders() -> None:
    assert ids_of(DataLoader(TensorDataset(IDS), batch_size=2)) == [IDS.tolist()]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in IDS]
    ((args, kwargs),) = read(DataLoader(rows, batch_size=2))
    assert torch.equal(args[0], IDS)
    assert torch.equal(kwargs["attention_mask"], torch.ones_like(IDS))


def test_rows_of_a_data_set_and_lists_of_different_lengths() -> None:
    rows = [{"input_ids": [1, 2, 3], "text": "abc"}, {"input_ids": [4, 5], "text": "de"}]
    assert ids_of(rows) == [[[1, 2, 3]], [[4, 5]]]
    assert ids_of([[1, 2, 3], [4]]) == [[[1, 2, 3]], [[4]]]
    rows_of_each_length = [[[1, 2, 3], [6, 7, 8]], [[4, 5]]]
    batch = [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert ids_of([batch]) == rows_of_each_length
    # A tokenizer that was not told to pad.
    assert ids_of([{"input_ids": batch, "attention_mask": [[1] * len(row) for row in batch]}]) == rows_of_each_length
    assert ids_of([{"input_ids": [torch.tensor(row) for row in batch]}]) == rows_of_each_length


def test_floats_become_float32_and_end_their_history() -> None:
    with torch.inference_mode():
        made = torch.randn(2, 3, 4)
    for x in (torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).half(), torch.randn(2, 3, 4).requires_grad_(), made):
        (((given,), _),) = read([(x,)], Open())
        assert given.dtype == torch.float32
        assert not given.requires_grad
        assert not given.is_inference()


def test_open_signatures_keep_every_input() -> None:
    ((args, kwargs),) = read([(IDS, IDS)], Open())
    assert len(args) == 2
    ((args, kwargs),) = read([{"x": IDS, "attention_mask": torch.ones_like(IDS)}], Open())
    assert list(kwargs) == ["x", "attention_mask"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (IDS, r"calibration is one tensor: give an iterable of batches, for example \[batch\]"),
        ({"input_ids": IDS}, "calibration is of type dict"),
        ("text", "calibration is of type str"),
        (3, "calibration is of type int"),
        (["text"], "calibration batch 0: this is text: tokenize it first"),
        ([IDS, ["a", "b"]], "calibration batch 1: this is text"),
        ([object()], "a tuple of the model's positional inputs, or a dictionary of its keyword inputs, as a tokenizer"),
        ([None], "calibration batch 0: this is of type NoneType"),
        ([[]], "calibration batch 0: this is an empty list"),
        ([{"input_ids": [[1, 2], ["a"]]}], "calibration batch 0: input_ids is no rectangle of numbers: give a tensor"),
        (
            [{"input_ids": IDS, "attention_mask": object()}],
            "calibration batch 0: attention_mask is of type object: give a tensor",
        ),
        ([(IDS,) * 6], "does not fit Masked.forward: too many positional arguments"),
        (
            [IDS[0]],
            r"calibration batch 0: input_ids must be \(batch, length\) int64 .*got a tensor of shape \(5,\), torch.int64",
        ),
        ([IDS.float()], r"input_ids must be .*got a tensor of shape \(2, 5\), torch.float32"),
        ([IDS, IDS + 256], "calibration batch 1: input_ids holds .*, outside the vocabulary of 256 tokens"),
        ([IDS[:, :0]], r"calibration batch 0: input_ids is empty, of shape \(2, 0\)"),
        (
            [{"ids": IDS}],
            "calibration batch 0: this holds ids, and Masked.forward takes input_ids, .*: name its inputs so",
        ),
        ([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}], "batch 0: attention_mask is 0 everywhere"),
        (
            [{"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]]).expand(2, -1)}],
            "batch 0: attention_mask is 0 between tokens",
        ),
    ],
)
def test_what_is_no_batch_is_named(batches: Any, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        read(batches)


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


@pytest.fixture(scope="module")
def theirs() -> Callable[[], nn.Module]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
        return transformers.MambaForCausalLM(config).eval()

    return build


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_transformers_models(theirs: Callable[[], nn.Module], side: str) -> None:
    batch = padded(side)
    padding = mq_ao.quantize(theirs(), [batch], "rtn-w8a8")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in alone(batch)]
    without = mq_ao.quantize(theirs(), rows, "rtn-w8a8")
    given = {"input_ids": tokens(3, 9, seed=5), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    assert torch.equal(padding.converted(**given).logits, without.converted(**given).logits)


def test_tokenizers_batches_and_positional_ids_give_the_same(theirs: Callable[[], nn.Module]) -> None:
    from transformers import BatchEncoding

    ids = [tokens(2, 12, seed=seed) for seed in range(3)]
    one = mq_ao.quantize(theirs(), ids, "rtn-w8a8")
    other = mq_ao.quantize(theirs(), [BatchEncoding({"input_ids": batch}) for batch in ids], "rtn-w8a8")
    assert torch.equal(one.converted(ids[0]).logits, other.converted(ids[0]).logits)


def test_the_second_input_of_mamba2_is_not_the_mask() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Mamba2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, head_dim=16, num_heads=4, n_groups=1, state_size=16
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    with pytest.raises(MqAoError, match=r"fails on the example inputs .*inputs_embeds: \(2, 5\) torch.int64"):
        mq_ao.quantize(model, [(IDS % 99, torch.ones_like(IDS))])
    assert mq_ao.quantize(model, [{"input_ids": IDS % 99, "attention_mask": torch.ones_like(IDS)}], "rtn-w8a8")
