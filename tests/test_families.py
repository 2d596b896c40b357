"""The table of other libraries' models in docs/support.md is what this tree does with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mq_ao import MqAoError
from tests import families

pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')

SUPPORT = Path(__file__).parent.parent / "docs/support.md"


@pytest.fixture(scope="module")
def measured() -> list[families.Family]:
    try:
        others = list(families.mamba_ssm_families())
    except MqAoError:
        others = []  # mamba_ssm is not installed; its own tests say so
    return [*others, *families.transformers_families()]


def test_every_block_of_every_model_is_matched_and_quantized(measured: list[families.Family]) -> None:
    for family in measured:
        assert family.blocks == family.scans > 0, family.name
        assert family.linears >= family.all_linears - family.in_float, family.name


def test_captured_models_equal_the_library_and_integers_equal_their_simulation(
    measured: list[families.Family],
) -> None:
    for family in measured:
        assert family.capture_error < 1e-4, family.name
        # A value on the border between two integers may fall to either side; then the next layers follow it.
        assert family.integer_error < 2e-2, family.name


def test_the_support_table_is_this_one(measured: list[families.Family]) -> None:
    # `python -m tests.families` prints it.
    rows = families.table(measured).splitlines()
    written = SUPPORT.read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in written] == []
