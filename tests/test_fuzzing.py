"""Damaged files are refused in a sentence or work; `python -m tests.fuzzing` tries as many as there is time for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import KINDS, Kind, damaged, outcome

QUICK = ("ptn", "ptc", "safetensors", "yaml")
"""Kinds whose files are made without compiling."""


@pytest.mark.parametrize("kind", QUICK)
def test_damaged_files_are_refused_or_work(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind].make(tmp_path)
    content = path.read_bytes()
    KINDS[kind].use(path)
    assert {seed: what for seed in range(40) if (what := outcome(kind, path, content, seed)) is not None} == {}


def test_seeds_make_the_damage() -> None:
    content = bytes(range(256)) * 20
    files = [damaged(content, seed) for seed in range(100)]
    assert files == [damaged(content, seed) for seed in range(100)]
    assert len(set(files)) > 95 and content not in files


def test_other_exceptions_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "bad", Kind(lambda folder: folder / "x", lambda path: {}[path.name]))
    assert outcome("bad", tmp_path / "x", b"content", 0) == "KeyError: 'x'"
