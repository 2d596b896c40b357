"""Calibration data from files, texts and rows, as `mq_ao.text.calibration` makes it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao.errors import MqAoError
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.recipe_files import to_yaml
from mq_ao.recipes import get_recipe
from mq_ao.text import ByteCodec, TokenizerCodec, calibration, calibration_batches, codec_for, read_tokens

TEXT = "def f(x):\n    return x + 1\n" * 40


@pytest.fixture(scope="module")
def bytewise() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=256, d_model=16, n_layer=1)).eval()


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of whole words: <s> is 0, and a, b and c are 1 to 3."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    table = {word: index for index, word in enumerate(["<s>", "a", "b", "c", "?"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")


def joined(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches).flatten().tolist()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_gives_the_batches_of_the_command_line(kind: Any, tmp_path: Path, bytewise: MambaLM) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    batches = calibration(kind(tmp_path / "text.txt"), bytewise, tokens=256, length=32, batch=3)
    expected = calibration_batches(read_tokens(tmp_path / "text.txt", 256, ByteCodec()), 256, 32, 3)
    assert [batch.shape for batch in batches] == [(3, 32), (3, 32), (2, 32)]
    assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))


@pytest.mark.parametrize("kind", [str, Path])
def test_stored_ids_need_no_tokenizer(kind: Any, tmp_path: Path) -> None:
    numpy.save(tmp_path / "ids.npy", numpy.arange(64, dtype=numpy.int32))
    model = MambaLM(MambaConfig(vocab_size=64, d_model=8, n_layer=1))
    assert joined(calibration(kind(tmp_path / "ids.npy"), model, tokens=64, length=16)) == list(range(64))
    smaller = MambaLM(MambaConfig(vocab_size=63, d_model=8, n_layer=1))
    with pytest.raises(MqAoError, match=r"holds token ids 0\.\.63, outside the model's vocabulary of 63"):
        calibration(kind(tmp_path / "ids.npy"), smaller)


def test_texts_of_every_kind_give_the_same_tokens(bytewise: MambaLM) -> None:
    expected = [0, *TEXT.encode()]
    rows = [{"id": 1, "text": TEXT}]
    for source in (TEXT, TEXT.encode(), [TEXT], (TEXT,), iter([TEXT]), rows, iter(rows), {"text": [TEXT]}, rows[0]):
        assert joined(calibration(source, bytewise, tokens=9999, length=9999)) == expected
    assert joined(calibration([{"body": TEXT}], bytewise, column="body", length=9999)) == expected


def test_a_tokenizer_reads_strings(tmp_path: Path, words: Any) -> None:
    texts = ["a b", "", "c c a"]
    expected = [0, 1, 2, 0, 3, 3, 1]
    words.save_pretrained(tmp_path)
    for reader in (words, TokenizerCodec(words), tmp_path, str(tmp_path)):
        assert joined(calibration(texts, reader, length=7)) == expected
    # Whole windows: three of two tokens, and the last token is left over.
    assert [batch.tolist() for batch in calibration(texts, words, length=2, batch=2)] == [[[0, 1], [2, 0]], [[3, 3]]]


def test_an_endless_stream_is_read_as_far_as_needed(words: Any) -> None:
    read: list[int] = []

    def stream() -> Iterator[dict[str, str]]:
        for index in itertools.count():
            read.append(index)
            yield {"text": "a b c"}

    batches = calibration(stream(), words, tokens=10, length=4)
    assert joined(batches) == [0, 1, 2, 3] * 3
    assert read == [0, 1, 2]


def test_the_tokenizer_beside_a_model_of_transformers(tmp_path: Path, words: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(MqAoError, match="the model's 5 tokens are not bytes.*: give the tokenizer"):
        calibration(["a b"], model)
    words.save_pretrained(tmp_path)
    assert joined(calibration(["a b"], model)) == [0, 1, 2]
    small = transformers.MambaConfig(vocab_size=2, hidden_size=8, num_hidden_layers=1, name_or_path=str(tmp_path))
    with pytest.raises(MqAoError, match=r"the text holds token ids 0\.\.2, outside the model's vocabulary of 2"):
        calibration(["a b"], transformers.MambaForCausalLM(small))


def test_batches_quantize_a_model(bytewise: MambaLM, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(to_yaml(get_recipe("rtn-w8a8")))
    batches = calibration(TEXT, bytewise, tokens=256, length=32)
    report = mq_ao.quantize(bytewise, batches, get_recipe(tmp_path / "mine.yaml")).report()
    assert (report.batches, report.tokens, report.recipe.name) == (2, 256, "rtn-w8a8")


def test_recipes_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(MqAoError, match="cannot be read"):
        get_recipe(path)
    path.write_text(to_yaml(get_recipe("rtn-w8a8")))
    assert get_recipe(path) == get_recipe(str(path)) == get_recipe("rtn-w8a8")


def test_fewer_tokens_than_asked_for_are_told(bytewise: MambaLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mq_ao.text"):
        calibration(["short"], bytewise, tokens=7)
        assert "there are 6 tokens to calibrate on, and 7 were asked for" in caplog.text
        caplog.clear()
        calibration(["short"], bytewise, tokens=6, length=3)
        assert caplog.text == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wiki.txt", "there is no file wiki.txt: check the path, or give a short text in a list"),
        (Path("wiki.txt"), "there is no file wiki.txt"),
        ([], "no text to calibrate on"),
        ([""], "no text to calibrate on"),
        ([{"body": "x"}], 'row 0 has body, and no "text": name the text\'s column'),
        (["x", 3], "row 1 is no text but int: give strings"),
        ([["x"]], "row 0 is no text but list"),
        (torch.zeros(2, 3), "row 0 is no text but Tensor"),
        ({"train": ["x"], "test": []}, "a mapping of train, test: give the rows of one of them"),
        (7, "int is no text: give a file"),
    ],
)
def test_what_is_no_text(source: Any, message: str, bytewise: MambaLM) -> None:
    with pytest.raises(MqAoError, match=message):
        calibration(source, bytewise)


@pytest.mark.parametrize("reader", [7, None, nn.Linear(2, 2)])
def test_what_reads_no_text(reader: Any) -> None:
    with pytest.raises(MqAoError, match="cannot read text: give the model's tokenizer, or a byte-level model"):
        calibration(["x"], reader)


@pytest.mark.parametrize("option", ["tokens", "length", "batch"])
def test_counts(option: str, bytewise: MambaLM) -> None:
    with pytest.raises(MqAoError, match=f"{option} is 0: give at least 1"):
        calibration(["x"], bytewise, **{option: 0})


def test_tokens_that_have_a_text(words: Any) -> None:
    assert TokenizerCodec(words).known_tokens == 5
    codec = codec_for(256)
    assert codec is not None and codec.known_tokens == 256
