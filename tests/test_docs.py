"""What code, tests and documents cite is in the repository: documents, sections, steps, decisions, and links."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mq_ao.passes import PASSES
from tests.test_packaging import ROOT, tracked

DOCS = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
CITING = (".py", ".h", ".cpp", ".md")
# "section 3", "sections 2 and 3", "decisions 1, 4 and 5", "sections 1 to 4"; "S2", "S2, S4 and R1"; "shift".
NUMBERS = r"\d+(?:(?:, | and | to )\d+)*"
STEPS = r"[SR]\d+(?:(?:, | and )[SR]\d+)*"
CITED = re.compile(rf"\b(docs/\w+\.md),? ?((?:section|decision)s? {NUMBERS}|{STEPS}|shift\b)?")
OWN = re.compile(rf"(?<!\.md, )\b((?:section|decision)s? {NUMBERS})")
DOCUMENT = re.compile(r"(?<![\w/.-])(?:docs/[\w./-]+|[A-Z][A-Z_]+)\.md\b")
STEP = re.compile(r"(?<![\w.-])[SR]\d+\b(?![\w-])")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCE = re.compile(r"`((?:mq_ao|quantizer|lowering|tests|examples)/[\w./-]*)`")
OUTSIDE = ("https://", "http://", "mailto:")


@functools.cache
def files(*suffixes: str) -> dict[str, str]:
    """Tracked files and their text."""
    names = sorted(name for name in tracked() if name.endswith(suffixes))
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


def unwrapped(text: str) -> str:
    """Text on one line: a citation may go on behind the marks of the next line's comment."""
    return re.sub(r"\s*\n\s*(?://+|#+|\*)?\s*", " ", text)


def prose(text: str) -> str:
    """Markdown without blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@functools.cache
def parts(document: str) -> frozenset[str]:
    """What can be cited of a document: "section 3", "decision 4", "S2", "shift"."""
    found = set()
    for heading in HEADING.findall(prose((ROOT / document).read_text(encoding="utf-8"))):
        if match := re.match(r"(\d+)\. ", heading):
            found.add(f"section {match[1]}")
        elif match := re.match(r"Decision (\d+): ", heading):
            found.add(f"decision {match[1]}")
        elif match := re.match(r"([SR]\d+|shift): ", heading):
            found.add(match[1])
    return frozenset(found)


def named(citation: str) -> Iterator[str]:
    """The parts that a citation names, a range of them one by one."""
    kind = re.match(r"section|decision", citation)
    if kind is None:
        yield from re.findall(r"[SR]\d+|shift", citation)
    elif bounds := re.search(r"(\d+) to (\d+)", citation):
        yield from (f"{kind[0]} {number}" for number in range(int(bounds[1]), int(bounds[2]) + 1))
    else:
        yield from (f"{kind[0]} {number}" for number in re.findall(r"\d+", citation))


def wrong_citations(name: str, text: str) -> list[str]:
    """Citations in a file that lead nowhere."""
    text = unwrapped(prose(text) if name.endswith(".md") else text)
    wrong = []
    for document, citation in CITED.findall(text):
        if document not in DOCS:
            wrong.append(document)
        else:
            wrong += [f"{document}, {part}" for part in named(citation) if part not in parts(document)]
    if name in DOCS:
        wrong += [part for citation in OWN.findall(text) for part in named(citation) if part not in parts(name)]
    else:
        # A paper has sections too, but decisions are ours.
        wrong += [citation for citation in OWN.findall(text) if citation.startswith("decision")]
    return wrong


def slugs(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them; all differ in ours."""
    headings = HEADING.findall(prose((ROOT / document).read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("(docs/method.md, section 3), docs/method.md, S2 and R1; docs/method.md, shift", []),
        ("docs/design.md, decision 4", []),
        ("sections (docs/method.md, sections\n    # 1 to 4) of docs/method.md", []),
        ("Dao and Gu 2024, section 60", []),
        ("docs/method.md, section 99", ["docs/method.md, section 99"]),
        ("(docs/method.md,\n// sections 2 and 99)", ["docs/method.md, section 99"]),
        ("docs/method.md, sections 7 to 9", ["docs/method.md, section 9"]),
        ("docs/method.md, decision 1", ["docs/method.md, decision 1"]),
        ("docs/design.md, S2", ["docs/design.md, S2"]),
        ("docs/method.md, S2, S3", ["docs/method.md, S3"]),
        ("docs/missing.md, section 1", ["docs/missing.md"]),
        ("as decision 4 has it", ["decision 4"]),
    ],
)
def test_what_is_wrong_with_a_citation(text: str, wrong: list[str]) -> None:
    assert wrong_citations("mq_ao/any.py", text) == wrong


def test_every_cited_section_step_and_decision_exists() -> None:
    cited = 0
    for name, text in files(*CITING).items():
        if name != "tests/test_docs.py":
            assert not wrong_citations(name, text), name
            cited += len(CITED.findall(unwrapped(text)))
    assert cited > 30


def test_every_document_that_is_mentioned_exists() -> None:
    known = tracked()
    anywhere = {Path(name).name for name in known}
    for name, text in files(*CITING).items():
        if name == "tests/test_docs.py":
            continue
        for mentioned in DOCUMENT.findall(text):
            # A bare name may be that of a file in a folder, such as a model's card.
            assert mentioned in known or mentioned in anywhere, f"{name} mentions {mentioned}"


def test_every_step_that_is_mentioned_has_its_heading() -> None:
    for name, text in files(*CITING, ".yaml").items():
        if name != "tests/test_docs.py":
            assert set(STEP.findall(text)) <= parts("docs/method.md"), name


def test_every_pass_has_its_place_in_the_method() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    for name, kind in PASSES.items():
        assert f"| `{name}` | `{kind.__module__.replace('.', '/')}.py` |" in text
        assert not kind.step or kind.step in parts("docs/method.md")


def test_every_source_file_that_the_documents_name_exists() -> None:
    known = tracked()
    for document in DOCS:
        for path in SOURCE.findall((ROOT / document).read_text(encoding="utf-8")):
            assert path in known or (path.endswith("/") and any(name.startswith(path) for name in known)), path


def test_relative_links_lead_somewhere() -> None:
    known = tracked()
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    for name, text in files(".md").items():
        for link in LINK.findall(prose(text)):
            if link.startswith(OUTSIDE):
                continue
            path, _, anchor = link.partition("#")
            target = name if not path else (ROOT / name).parent.joinpath(path).resolve().relative_to(ROOT).as_posix()
            assert target in known | folders, f"{name} links to {link}"
            assert not anchor or anchor in slugs(target), f"{name} links to {link}"


def test_measured_figures_are_those_of_their_pages() -> None:
    """The excerpt in the method repeats what the pages of the measurements have."""
    measured = (ROOT / "docs/method.md").read_text(encoding="utf-8").partition("## 8. ")[2]
    rows = [line.split("|")[2:-1] for line in measured.splitlines() if re.match(r"\| [^|]+ \| [\d.]", line)]
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("ablation.md", "vision.md"))
    told = set(re.findall(r"[\d.]*\d", pages))
    assert len(rows) == 5
    assert not {cell.strip() for row in rows for cell in row} - told
