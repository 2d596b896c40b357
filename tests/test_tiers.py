"""The list of what smaller test runs leave out names files and tests that there are."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import TIERS

TESTS = Path(__file__).parent


def test_files_are_in_one_tier_and_exist() -> None:
    files = [file for tier in TIERS.values() for file in tier["files"]]
    assert len(files) == len(set(files))
    assert [file for file in files if not (TESTS / file).exists()] == []


def test_functions_exist() -> None:
    for named in TIERS["slowest"]["functions"]:
        file, _, function = named.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(), named
