"""Costs of texts against hand computation, and every bad input of `mq_ao.text` and `mq_ao.evaluate`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mq_ao.errors import MqAoError
from mq_ao.evaluate import bits_per_byte, compare, evaluate
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.text import (
    BYTE_VOCABULARY,
    ByteCodec,
    TokenizerCodec,
    TokenText,
    calibration_batches,
    codec_for,
    read_tokens,
)

UNTIMED = settings(deadline=None, max_examples=25)  # a first call loads kernels
TEXT = b"def f(x):\n    return x + 1\n\0import os\n\0" + bytes(range(1, 200))


@pytest.fixture(scope="module")
def small() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=BYTE_VOCABULARY, d_model=16, n_layer=1)).eval()


@pytest.fixture
def text(tmp_path: Path) -> TokenText:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return read_tokens(path, BYTE_VOCABULARY, ByteCodec())


class Constant:
    """A model that gives every token the same logits, whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(
        self, ids: torch.Tensor, conv: torch.Tensor | None = None, ssm: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        empty = torch.empty(0)
        return self.logits.expand(*ids.shape, -1), empty, empty


def ids(*documents: list[int], size: int | None = None) -> TokenText:
    return TokenText(tuple(torch.tensor(document) for document in documents), size)


def test_bytes_cost_their_cross_entropy_document_by_document(small: MambaLM, text: TokenText) -> None:
    result = evaluate(small, text)
    assert result.tokens == result.text_bytes == len(TEXT)
    nats = 0.0
    for document in (b"def f(x):\n    return x + 1\n\0", b"import os\n\0", bytes(range(1, 200))):
        context = torch.tensor([[0, *document]])
        logits = small(context[:, :-1])[0][0]
        nats += torch.nn.functional.cross_entropy(logits, context[0, 1:], reduction="sum").item()
    # Sums of the same float32 costs.
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-6)
    assert bits_per_byte(small, TEXT) == pytest.approx(result.bits_per_byte)


@UNTIMED
@given(chunk=st.integers(1, 300))
def test_chunks_do_not_change_the_cost(small: MambaLM, chunk: int) -> None:
    text = ids([0, *TEXT[:120]], size=120)
    # The scan and the products sum in another order: float32 rounding only.
    assert evaluate(small, text, chunk=chunk).nats == pytest.approx(evaluate(small, text).nats, rel=1e-5)


@UNTIMED
@given(window=st.integers(1, 130))
def test_a_window_starts_from_a_zero_state(small: MambaLM, window: int) -> None:
    document = [0, *TEXT[:120]]
    pieces = [document[start : start + window + 1] for start in range(0, 120, window)]
    windowed = evaluate(small, ids(document), window=window)
    assert windowed.nats == pytest.approx(evaluate(small, ids(*pieces)).nats, rel=1e-5)
    assert windowed.tokens == 120


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary() -> None:
    result = evaluate(Constant(torch.zeros(64)), ids([1, 2, 3, 4, 5], size=8))
    assert result.nats == pytest.approx(4 * math.log(64), rel=1e-6)
    assert result.perplexity == pytest.approx(64, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(4 * 6 / 8, rel=1e-6)
    assert result.accuracy == 0.0  # argmax of equal logits is token 0


def test_without_a_text_size_there_are_no_bits_per_byte() -> None:
    result = evaluate(Constant(torch.zeros(8)), ids([1, 2]))
    assert result.bits_per_byte is None
    assert result.to_dict()["bytes"] is None


def test_comparison_matches_hand_computation() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    result = compare(Constant(p.log()), Constant(q.log()), ids([0, 0, 1, 2]))
    expected = float((p * (p / q).log()).sum())
    assert result.divergence == pytest.approx(expected, rel=1e-6)
    assert result.agreement == 0.0
    assert result.reference.nats == pytest.approx(-math.log(0.7 * 0.2 * 0.1), rel=1e-6)
    assert result.other.accuracy == pytest.approx(1 / 3)


def test_a_model_agrees_with_itself(small: MambaLM, text: TokenText) -> None:
    result = compare(small, small, text)
    assert result.divergence == 0.0
    assert result.agreement == result.relative_cost == 1.0
    assert result.to_dict() == {"kl_divergence": 0.0, "agreement": 1.0, "relative_cost": 1.0}


def test_progress_counts_every_token(small: MambaLM, text: TokenText) -> None:
    seen: list[int] = []
    evaluate(small, text, chunk=50, progress=seen.append)
    assert sum(seen) == text.predicted


def test_models_that_cannot_be_compared(text: TokenText) -> None:
    with pytest.raises(MqAoError, match="vocabularies of 256 and 300"):
        compare(Constant(torch.zeros(256)), Constant(torch.zeros(300)), text)
    with pytest.raises(MqAoError, match="NaN or Inf"):
        evaluate(Constant(torch.full((256,), torch.nan)), text)
    with pytest.raises(MqAoError, match="the window is 0"):
        evaluate(Constant(torch.zeros(256)), text, window=0)
    with pytest.raises(MqAoError, match="the chunk is -1"):
        evaluate(Constant(torch.zeros(256)), text, chunk=-1)


@UNTIMED
@given(st.binary(min_size=1))
def test_byte_documents_join_to_the_text(content: bytes) -> None:
    documents = ByteCodec().documents(content)
    assert all(document[0] == 0 for document in documents)
    assert b"".join(bytes(document[1:]) for document in documents) == content


@UNTIMED
@given(st.text())
def test_bytes_decode_piece_by_piece(content: str) -> None:
    encoded = content.encode()
    assert "".join(ByteCodec().pieces(encoded)) == content


def test_token_files(tmp_path: Path) -> None:
    numpy.save(tmp_path / "rows.npy", numpy.arange(12, dtype=numpy.int32).reshape(2, 6))
    save_file({"input_ids": torch.arange(7)}, tmp_path / "vector.safetensors")
    rows = read_tokens(tmp_path / "rows.npy", 12, None)
    vector = read_tokens(tmp_path / "vector.safetensors", 12, None)
    assert [document.tolist() for document in rows.documents] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert vector.predicted == 6
    assert rows.text_bytes is None


def test_bad_token_files(tmp_path: Path) -> None:
    def read(name: str, vocab_size: int = 12) -> None:
        read_tokens(tmp_path / name, vocab_size, None)

    with pytest.raises(MqAoError, match="there is no file"):
        read("missing.npy")
    numpy.save(tmp_path / "floats.npy", numpy.zeros(4))
    with pytest.raises(MqAoError, match="token ids are integers"):
        read("floats.npy")
    numpy.save(tmp_path / "objects.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(MqAoError, match="cannot be read as token ids"):
        read("objects.npy")
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(MqAoError, match="cannot be read as token ids"):
        read("broken.safetensors")
    save_file({"a": torch.arange(3), "b": torch.arange(3)}, tmp_path / "two.safetensors")
    with pytest.raises(MqAoError, match="holds 2 tensors"):
        read("two.safetensors")
    numpy.save(tmp_path / "large.npy", numpy.arange(20))
    with pytest.raises(MqAoError, match=r"0\.\.19, outside the model's vocabulary of 12"):
        read("large.npy")
    numpy.save(tmp_path / "one.npy", numpy.arange(1))
    with pytest.raises(MqAoError, match="is empty"):
        read("one.npy")


def test_bad_texts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with pytest.raises(MqAoError, match="is empty"):
        read_tokens(path, BYTE_VOCABULARY, ByteCodec())
    path.write_bytes(b"words")
    with pytest.raises(MqAoError, match="--tokenizer"):
        read_tokens(path, 50280, codec_for(50280))


@UNTIMED
@given(length=st.integers(2, 700), tokens=st.integers(1, 900), window=st.integers(1, 64))
def test_calibration_windows_come_from_the_text(length: int, tokens: int, window: int) -> None:
    batches = calibration_batches(ids(list(range(length))), tokens, length=window, batch=3)
    rows = torch.cat(batches)
    width = min(window, length)
    assert rows.shape == (min(length // width, -(-tokens // width)), width)
    assert all(len(batch) <= 3 for batch in batches)
    # Windows are stretches of the text, in order and apart.
    assert torch.equal(rows, rows[:, :1] + torch.arange(width))
    assert (rows[1:, 0] > rows[:-1, -1]).all()


def test_calibration_wants_tokens() -> None:
    with pytest.raises(MqAoError, match="--tokens is 0"):
        calibration_batches(ids([1, 2, 3]), 0)


def test_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path)
    codec = codec_for(4, source=str(tmp_path))
    assert isinstance(codec, TokenizerCodec)
    assert codec.documents(b"a b a") == [[0, 1, 2, 1]]
    assert "".join(codec.pieces([1, 2])) == "a b"
    with pytest.raises(MqAoError, match="not UTF-8"):
        codec.documents(b"\xff")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(MqAoError, match="cannot be loaded"):
        codec_for(4, tokenizer=str(tmp_path / "nothing"))
