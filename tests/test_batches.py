"""Calibration data as people have it."""

from __future__ import annotations

import datetime
import logging
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mq_ao
from mq_ao import MqAoError
from mq_ao.calibration.batches import Given
from mq_ao.calibration.calls import calls
from mq_ao.lowering.language_graphs import states_of
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
        {"input_ids": IDS, "text": ["a", "b"], "no_parameter": IDS, "inputs_embeds": None},
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


COLUMNS = {
    "words": [["a", "b"], ["c"]],
    "score": [None, None],
    "about": [{"a": 1}, {"a": 2}],
    "day": [datetime.date(2026, 1, 1)],
    "thing": object(),
    "objects": numpy.array(["a", None], dtype=object),
}


@pytest.mark.parametrize("ids", [IDS, IDS.tolist(), IDS[0].tolist(), [IDS[0].numpy(), IDS[1].numpy()]])
def test_columns_that_no_model_takes_are_not_read(ids: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mq_ao"):
        batches = read([{"input_ids": ids, **COLUMNS}] * 2)
    assert [list(kwargs) for _, kwargs in batches] == [[]] * 2
    assert caplog.text.count("no use for words") == 1


def test_arrays_that_run_backwards_or_are_read_only() -> None:
    array = IDS.numpy()[:, ::-1]
    array.flags.writeable = False
    for batch in (array, (array,), {"input_ids": array}):
        assert ids_of([batch]) == [IDS.flip(1).tolist()]
    ((args, _),) = read([(numpy.float64(2.0), numpy.arange(3.0)[::-1])], Open())
    assert args[0] == 2.0
    assert torch.equal(args[1], torch.tensor([2.0, 1.0, 0.0]))


def test_every_column_is_cut_with_lists_of_different_lengths() -> None:
    rows = [torch.arange(3), torch.arange(5)]
    for column in (torch.tensor([1, 2]), numpy.array([1, 2]), [1, 2], (1, 2)):
        batches = read([{"input_ids": rows, "inputs_embeds": column}])
        assert [args[1].tolist() for args, _ in batches] == [[2], [1]]


def test_labels_are_left_out_for_transformers_models_alone(theirs: Callable[[], nn.Module]) -> None:
    batch = {"input_ids": IDS, "labels": IDS, "use_cache": True}
    assert [list(kwargs) for _, kwargs in read([batch], theirs())] == [[]]
    ((_, kwargs),) = read([batch])
    assert torch.equal(kwargs["labels"], IDS) and kwargs["use_cache"] is True
    with pytest.raises(MqAoError, match="seq_idx says that sequences are packed: give one sequence a row"):
        read([{"input_ids": IDS, "seq_idx": IDS}], theirs())


def test_batches_that_are_made_in_one_memory_are_copied() -> None:
    def batches() -> Iterator[Tensor]:
        memory = torch.zeros(2, 3, 4)
        for value in range(3):
            yield memory.fill_(value)

    assert [float(args[0].max()) for args, _ in read(batches(), Open())] == [0, 1, 2]


def test_one_value_a_sequence_beside_whole_batches_stays() -> None:
    batch = {"x": torch.ones(2, 3, 4), "lengths": torch.tensor([3, 2])}
    ((_, kwargs),) = read([batch], Open())
    assert kwargs["lengths"].shape == (2,)


def test_an_input_may_be_called_as_the_parameter_that_takes_all() -> None:
    ((_, kwargs),) = read([{"x": IDS, "kwargs": IDS}], Open())
    assert list(kwargs) == ["x", "kwargs"]


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
        ([IDS, [[1, 2], []]], "calibration batch 1: sequence 1 is empty: leave it out"),
        ([[[]]], "calibration batch 0: sequence 0 is empty"),
        ([{"input_ids": [[1, 2], []]}], "calibration batch 0: sequence 1 is empty"),
        ([{"input_ids": [[2**70]]}], "calibration batch 0: input_ids is no rectangle of numbers"),
        ([[[2**70]]], "calibration batch 0: it is no rectangle of numbers"),
        ([{"input_ids": 3}], "calibration batch 0: input_ids must be .*got a tensor of shape"),
        ([{"input_ids": IDS.to("meta")}], r"calibration batch 0: input_ids has no plain values in memory \(meta"),
        ([{"input_ids": numpy.array([[1, "a"]], dtype=object)}], "calibration batch 0: input_ids is no rectangle"),
        ([(numpy.array([[1, "a"]], dtype=object),)], "calibration batch 0: input_ids is of type ndarray"),
        ([{"input_ids": ["some", "text"]}], "calibration batch 0: this is text"),
        ([{"input_ids": IDS, 1: IDS}], "calibration batch 0: there is a key 1: a dictionary's keys are the names"),
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
            r"calibration batch 0: input_ids must be \(batch, length\) .*got a tensor of shape \(5,\), torch.int64",
        ),
        ([IDS.float()], r"input_ids must be .*got a tensor of shape \(2, 5\), torch.float32"),
        ([IDS, IDS + 256], "calibration batch 1: input_ids holds .*, outside the vocabulary of 256 tokens"),
        ([IDS[:, :0]], r"calibration batch 0: input_ids is empty, of shape \(2, 0\)"),
        (
            [{"ids": IDS}],
            "calibration batch 0: this holds ids, and Masked.forward takes input_ids, .*: name its inputs so",
        ),
    ],
)
def test_what_is_no_batch_is_named(batches: Any, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        read(batches)


@pytest.fixture(scope="module")
def theirs() -> Callable[[], nn.Module]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
        return transformers.MambaForCausalLM(config).eval()

    return build


def test_tokenizers_batches_and_positional_ids_give_the_same(theirs: Callable[[], nn.Module]) -> None:
    from transformers import BatchEncoding

    ids = [tokens(2, 12, seed=seed) for seed in range(3)]
    one = mq_ao.quantize(theirs(), ids, "rtn-w8a8")
    other = mq_ao.quantize(theirs(), [BatchEncoding({"input_ids": batch}) for batch in ids], "rtn-w8a8")
    given = (ids[0], *states_of(one.converted).examples(2, 0))
    assert torch.equal(one.converted(*given)[0], other.converted(*given)[0])


def test_the_second_input_of_mamba2_is_not_the_mask() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Mamba2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, head_dim=16, num_heads=4, n_groups=1, state_size=16
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    with pytest.raises(MqAoError, match=r"fails on the example inputs .*inputs_embeds: \(2, 5\) torch.int64"):
        mq_ao.quantize(model, [(IDS % 99, torch.ones_like(IDS))])
    assert mq_ao.quantize(model, [{"input_ids": IDS % 99, "attention_mask": torch.ones_like(IDS)}], "rtn-w8a8")
