"""Tokenizers that programs keep: every family from a folder to text, without the folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mq_ao as package
from mq_ao import MqAoError, tokenizer
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.text import TokenizerCodec, calibration
from tests.conftest import CommandLine
from tests.test_capture_transformers import MODELS, VOCAB, build

FAMILIES = sorted({name for name in MODELS if "," not in name})
WORDS = [f"w{index}" for index in range(VOCAB - 2)]


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    table = {word: index for index, word in enumerate(["<s>", *WORDS, "?"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 4))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_becomes_a_program_that_writes_text(
    name: str, mq_ao: CommandLine, words: Any, text: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "model", tmp_path / "model.ptn"
    build(name).save_pretrained(folder)
    words.save_pretrained(folder)
    given = ("--calibration", text, "--tokens", "128", "--recipe", "rtn-w8a8", "-o", output)
    run = mq_ao("quantize", folder, *given)
    assert run.code == 0, run.err
    folder.rename(tmp_path / "elsewhere")
    run = mq_ao("generate", output, "--prompt", "w1 w2 w3", "-n", "6")
    assert run.code == 0, run.err
    assert run.out.startswith("w1 w2 w3")
    assert set(run.out.split()) <= {"<s>", *WORDS, "?"}
    assert len(run.out.split()) == 9


@functools.cache
def spelled(kind: str) -> TokenizerCodec:
    """A tokenizer of single bytes, or of single characters with spaces as part of what follows them."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    if kind == "bytes":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        model = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
    else:
        table = {word: index for index, word in enumerate(["?", "\u2581a", "\u2581b", "\u2581c"])}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="?"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        model.decoder = tokenizers.decoders.Metaspace()
    plain = {"clean_up_tokenization_spaces": False}
    return TokenizerCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=model, **plain))


# The replacement character stands for what is not whole yet.
_CHARACTERS = st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}")


@settings(max_examples=50, deadline=None)
@given(st.text(_CHARACTERS, max_size=20), st.text(_CHARACTERS, min_size=1, max_size=20))
def test_characters_of_several_tokens_are_written_whole(prompt: str, rest: str) -> None:
    codec = spelled("bytes")
    (before,) = codec.documents(prompt.encode())
    (tokens,) = codec.documents(rest.encode())
    pieces = list(codec.pieces(tokens, before))
    assert "".join(pieces) == rest
    assert len(pieces) == len(rest)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
@settings(max_examples=50, deadline=None)
def test_a_word_keeps_its_space_behind_the_prompt(prompt: list[str], rest: list[str]) -> None:
    codec = spelled("words")
    (tokens,) = codec.documents(" ".join(prompt + rest).encode())
    before, after = tokens[: len(prompt)], tokens[len(prompt) :]
    assert " ".join(prompt) + "".join(codec.pieces(after, before)) == " ".join(prompt + rest)


def test_the_end_of_a_cut_character_is_written() -> None:
    codec = spelled("bytes")
    (tokens,) = codec.documents("a\u00e9".encode())
    assert "".join(codec.pieces(tokens[:-1])) == "a\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def small() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=16, n_layer=1, d_state=4)).eval()


def test_from_python(small: MambaLM, words: Any, tmp_path: Path) -> None:
    batches = calibration([" ".join(WORDS)], words, tokens=32, length=16)
    program = package.quantize(small, batches, "rtn-w8a8", tokenizer=words).lower()
    program.save(tmp_path / "small.ptn")
    loaded = package.load(tmp_path / "small.ptn")
    kept = tokenizer.restored(loaded.info["tokenizer"])
    assert kept.encode("w5 w6") == words.encode("w5 w6")
    assert torch.equal(torch.cat(calibration(["w1 w2"], loaded)), torch.cat(calibration(["w1 w2"], words)))


def test_inspect_says_that_it_is_kept(
    small: MambaLM, words: Any, text: Path, mq_ao: CommandLine, tmp_path: Path
) -> None:
    small.save_pretrained(tmp_path / "small")
    words.save_pretrained(tmp_path / "named")
    output = tmp_path / "small.ptn"
    given = ("--calibration", text, "--recipe", "rtn-w8a8", "--tokenizer", tmp_path / "named", "-o", output)
    assert mq_ao("quantize", tmp_path / "small", *given).code == 0
    run = mq_ao("inspect", output)
    assert run.code == 0, run.err
    assert "kept" in run.out
    assert "WordLevel" not in run.out, "the files themselves are not printed"


def test_what_is_no_tokenizer(small: MambaLM, words: Any, tmp_path: Path) -> None:
    ids = [torch.zeros(1, 8, dtype=torch.int64)]
    with pytest.raises(MqAoError, match="int is no tokenizer of transformers: give one"):
        package.quantize(small, ids, "rtn-w8a8", tokenizer=7)
    with pytest.raises(MqAoError, match="nothing cannot be loaded"):
        package.quantize(small, ids, "rtn-w8a8", tokenizer=tmp_path / "nothing")
    files = tokenizer.files(words)
    for name in ("../tokenizer.json", "..", "", "a/b"):
        with pytest.raises(MqAoError, match="which is no plain name"):
            tokenizer.restored({**files, name: "{}"})


def test_a_tokenizer_beside_a_model_that_cannot_be_loaded_is_left_out(
    small: MambaLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    quantized = package.quantize(tmp_path, [torch.zeros(1, 8, dtype=torch.int64)], "rtn-w8a8")
    assert "programs will not keep the tokenizer" in caplog.text
    assert "tokenizer" not in quantized.lower().info
