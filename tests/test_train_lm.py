"""The larger model's scripts: what is held out stays out, training goes on as if never stopped, and models load."""

from __future__ import annotations

import gzip
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mq_ao.cli.app import app
from mq_ao.models import Mamba2LM, MambaLM

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import lm_tokens
import text_corpus
import train_lm
from text_corpus import Source

NOTES = Source("notes", "MIT", ("*.txt", "*.gz"), ("*/translations/*",))
WORDS = Source("words", "public domain", ("*.dict",), cut=True)


def page(index: int) -> str:
    return f"Page {index} of the notes.\n" + "".join(f"Line {line} says {index * line % 97}.\n" for line in range(20))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two unpacked packages: pages, a few of which must not be read, and a dictionary."""
    root = tmp_path_factory.mktemp("packages")
    notes = root / "notes" / "doc"
    (notes / "translations").mkdir(parents=True)
    for index in range(1200):
        (notes / f"{index}.txt").write_text(page(index))
    (notes / "same.txt").write_text(page(7))
    (notes / "packed.gz").write_bytes(gzip.compress(b"Packed. " * 50))
    (notes / "latin.txt").write_bytes(b"\xe9" * 300)
    (notes / "short.txt").write_text("short")
    (notes / "large.txt").write_bytes(b"0" * (text_corpus.LARGEST + 1))
    (notes / "translations" / "other.txt").write_text(page(5000))
    (root / "notes" / "VERSION").write_text("1.2-3\n")
    (root / "words").mkdir()
    entries = [f"word{index}\n  {'meaning ' * 50}{index}\n\n" for index in range(300)]
    (root / "words" / "all.dict").write_text("".join(entries))
    return root


@pytest.fixture(scope="module")
def corpus(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    text_corpus.collect(packages, out, (NOTES, WORDS))
    return out


def test_documents_are_whole_and_in_one_split_each(packages: Path, corpus: Path) -> None:
    splits = {split: lm_tokens.read_split(corpus, split) for split in text_corpus.SPLITS}
    found = [document for documents in splits.values() for document in documents]
    assert len(found) == len(set(found))
    pages = {page(index).encode() for index in range(1200)} | {b"Packed. " * 50}
    assert {text for text in found if not text.startswith(b"word")} == pages
    pieces = [text for text in found if text.startswith(b"word")]
    assert sorted(b"".join(pieces)) == sorted((packages / "words" / "all.dict").read_bytes())
    # Behind an entry, never within one.
    assert len(pieces) > 3 and all(piece.endswith(b"\n\n") for piece in pieces)
    for split in ("heldout", "calibration"):
        assert 1 <= len(splits[split]) < 20
    assert text_corpus.split_of("notes/doc/0.txt") == text_corpus.split_of("notes/doc/0.txt")


def test_shares_take_other_documents_than_splits(packages: Path) -> None:
    half = replace(NOTES, share=0.5)
    names = [name for name, _ in text_corpus.documents(half, packages / "notes")]
    assert 500 < len(names) < 700
    kept = [
        name for name, _ in text_corpus.documents(NOTES, packages / "notes") if text_corpus.split_of(name) != "train"
    ]
    # Were it the same hash, all that is held out would be taken.
    assert 0 < len(set(kept) & set(names)) < len(kept)


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="unpack the Debian package notes there"):
        text_corpus.collect(tmp_path, tmp_path, (NOTES,))
    absent = Source("no_such_package", "MIT", ("*.py",), python=True)
    with pytest.raises(FileNotFoundError, match="pip install no_such_package"):
        text_corpus.collect(tmp_path, tmp_path, (absent,))


def test_sources_are_permissive_and_read_once() -> None:
    names = [source.name for source in text_corpus.SOURCES]
    assert len(names) == len(set(names))
    permissive = ("PSF", "BSD", "MIT", "Apache", "public domain")
    assert all(source.licence.startswith(permissive) for source in text_corpus.SOURCES)


def test_tokens_are_the_text(corpus: Path) -> None:
    tokenizer = lm_tokens.tokenizer_of(corpus, 512)
    ids = lm_tokens.token_ids(corpus, tokenizer)
    assert ids[0] == ids[-1] == 0 and int(ids.max()) < 512
    documents = lm_tokens.read_split(corpus, "train")
    assert int((ids == 0).sum()) == len(documents) + 1
    text = lm_tokens.END.encode().join([b"", *documents, b""])
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode() == text
    assert lm_tokens.tokenizer_of(corpus, 512).to_str() == tokenizer.to_str()


def plan(corpus: Path, out: Path, steps: int, cooldown: int = 0, *, bfloat16: bool = False) -> train_lm.Plan:
    return train_lm.Plan(
        out=out,
        corpus=corpus,
        seconds=None,
        steps=steps,
        cooldown=cooldown,
        length=32,
        batch=2,
        rate=1e-2,
        seed=0,
        bfloat16=bfloat16,
        save_seconds=0.0,
        eval_seconds=1e9,
    )


def trained(architecture: train_lm.Architecture, plan: train_lm.Plan) -> train_lm.Run:
    run = train_lm.Run(train_lm.SHAPES[architecture, train_lm.Size.TINY], plan)
    run.train()
    return run


def weights(run: train_lm.Run) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.model.parameters()])


@pytest.mark.parametrize("architecture", list(train_lm.Architecture))
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    architecture: train_lm.Architecture, corpus: Path, tmp_path: Path
) -> None:
    whole = trained(architecture, plan(corpus, tmp_path / "whole", 6))
    parts = tmp_path / "parts"
    trained(architecture, plan(corpus, parts, 3))
    # A cooldown in between is a branch: it leaves training as it was.
    finished = trained(architecture, plan(corpus, parts, 3, cooldown=4))
    rest = trained(architecture, plan(corpus, parts, 6))
    assert torch.equal(weights(whole), weights(rest)) and whole.step == rest.step == 6
    assert finished.step == 7 and finished.factor() == 0 and not torch.equal(weights(finished), weights(rest))


def test_a_cooldown_that_was_stopped_goes_on(corpus: Path, tmp_path: Path) -> None:
    mamba = train_lm.Architecture.MAMBA
    trained(mamba, plan(corpus, tmp_path, 2))
    run = train_lm.Run(train_lm.SHAPES[mamba, train_lm.Size.TINY], plan(corpus, tmp_path, 2, cooldown=4))
    factors = []
    for _ in range(2):
        factors.append(run.factor())
        run._update()
    run.save()
    again = trained(mamba, plan(corpus, tmp_path, 2, cooldown=4))
    assert factors == [1.0, 0.75] and again.step == 6
    assert (tmp_path / "cooldown-2-4.pt").exists() and torch.load(tmp_path / "checkpoint.pt")["step"] == 2


def test_interrupting_keeps_what_was_done(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_lm.Run(train_lm.SHAPES[train_lm.Architecture.MAMBA, train_lm.Size.TINY], plan(corpus, tmp_path, 9))
    update = run._update

    def interrupted() -> float:
        if run.step == 4:
            raise KeyboardInterrupt
        return update()

    monkeypatch.setattr(run, "_update", interrupted)
    with pytest.raises(train_lm.typer.Exit):
        run.train()
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("architecture", list(train_lm.Architecture))
def test_learns_and_the_model_is_what_its_card_says(
    architecture: train_lm.Architecture, bfloat16: bool, corpus: Path, tmp_path: Path
) -> None:
    run = trained(architecture, plan(corpus, tmp_path, 150, bfloat16=bfloat16))
    trained(architecture, plan(corpus, tmp_path, 150, cooldown=30, bfloat16=bfloat16))
    folder = tmp_path / "model"
    model = MambaLM.from_pretrained(folder)
    assert isinstance(model, Mamba2LM) == (architecture is train_lm.Architecture.MAMBA2)
    card = (folder / "MODEL_CARD.md").read_text()
    figure = re.search(r"\*\*(\d\.\d+) bits per byte", card)
    # The pages follow a pattern that is learned at once; untrained, a token of 512 costs 9 bits and has about 2 bytes.
    assert figure and float(figure[1]) < 2
    assert "30 steps of linear decay" in card and "| notes | 1.2-3 |" in card
    assert "intermediate" in (tmp_path / "latest" / "MODEL_CARD.md").read_text()
    stored = sum(weight.nbytes for weight in model.parameters()) / 2
    assert (folder / "model.safetensors").stat().st_size < 1.2 * stored  # bfloat16
    assert len(run.batches.text) > 10_000
    # The command line reads the same text with the tokenizer beside the model, and finds the same.
    result = CliRunner().invoke(app, ["eval", str(folder), "--text", str(folder / "heldout.txt")])
    assert result.exit_code == 0, result.output
    assert figure[1] in result.output
