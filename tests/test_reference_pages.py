"""Pages of docs/ that are made of the code are what the code makes now."""

from __future__ import annotations

import pytest

from tests import reference_pages

pytest.importorskip("typer", reason='needs pip install "mq-ao[cli]"')


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_the_page_is_what_the_code_makes(name: str) -> None:
    written = (reference_pages.DOCS / name).read_text(encoding="utf-8")
    assert written == reference_pages.PAGES[name](), "run `python -m tests.reference_pages`"
