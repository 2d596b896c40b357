"""Kernels that came with a wheel: the best that the processor has, for the PyTorch that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mq_ao.errors import MqAoError
from mq_ao.ops.native import build, prebuilt, wheel


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended wheel's kernels for all levels, on a machine without a compiler and with an empty cache."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "prebuilt")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("MQ_AO_CACHE", str(tmp_path / "cache"))
    for level in prebuilt.LEVELS:
        path = prebuilt.path_of(level, tmp_path / "prebuilt")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    return tmp_path / "prebuilt"


def test_the_best_level_of_the_processor_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in prebuilt.LEVELS:
        monkeypatch.setattr(prebuilt, "_instructions", lambda level=level: level.needs | {"something", "else"})
        assert build.build() == build.cached() == str(prebuilt.path_of(level, folder))


def test_levels_need_more_from_the_last_to_the_first() -> None:
    for better, level in zip(prebuilt.LEVELS, prebuilt.LEVELS[1:], strict=False):
        assert better.needs > level.needs


def test_this_machine_says_what_it_has() -> None:
    assert prebuilt._instructions()


@pytest.mark.parametrize("reason", ["an old processor", "another PyTorch", "a checkout"])
def test_without_suitable_kernels_a_compiler_is_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "an old processor":
        monkeypatch.setattr(prebuilt, "_instructions", lambda: frozenset({"sse2"}))
    elif reason == "another PyTorch":
        monkeypatch.setattr(prebuilt.torch, "__version__", "1.0.0")
    else:
        monkeypatch.setattr(prebuilt, "FOLDER", folder / "nothing")
    assert build.cached() is None
    with pytest.raises(MqAoError, match="no C\\+\\+ compiler found"):
        build.build()


def test_forced_builds_do_not_take_the_wheels(folder: Path) -> None:
    with pytest.raises(MqAoError, match="no C\\+\\+ compiler found"):
        build.build(force=True)


def test_a_wheels_library_names_no_place_of_this_machine() -> None:
    for level in prebuilt.LEVELS:
        made = wheel.library(level)
        assert made.arch == level.arch and not any("rpath" in flag for flag in made.toolkit().link)
