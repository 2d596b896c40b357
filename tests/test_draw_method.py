"""The figures of docs/method.md: what they show, and that the documents tell the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mq_ao.models import MambaLM

ROOT = Path(__file__).parents[1]
LABEL = re.compile(r"<!-- .*: max/min ([\d.]+) -->")


def ratios(path: Path) -> list[float]:
    """Largest over smallest value of every curve of a figure: matplotlib keeps texts as comments."""
    return [float(found) for found in LABEL.findall(path.read_text(encoding="utf-8"))]


def test_the_figures_show_what_the_rewrites_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "mq-ao[report]"')
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import draw_method

    # More than 4 tokens a channel of the residual stream (192), so that R1 is KLT-enhanced.
    figures = draw_method.figures(MambaLM.from_pretrained("demo"), 1024)
    for name, figure in figures.items():
        draw_method.save(figure, tmp_path / name)
    trained, hadamard, klt = ratios(tmp_path / "variances.svg")
    assert trained > hadamard > klt
    assert klt <= 1.01  # as the pass itself checks
    trained, smoothed, rotated = ratios(tmp_path / "out_proj.svg")
    assert trained > 3 * smoothed > 3 * rotated


def test_the_documents_tell_what_the_committed_figures_show() -> None:
    seen = set()
    for page in ("README.md", "docs/index.md", "docs/method.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for described, name in re.findall(r"!\[([^\]]*)\]\([\w/]*images/(\w+\.svg)\)", text):
            told = {float(number) for number in re.findall(r"\bby (?:a factor of )?([\d.]*\d)", described)}
            assert told and told <= set(ratios(ROOT / "docs/images" / name)), f"{page}: {name}"
            seen.add(name)
    assert seen == {"variances.svg", "out_proj.svg"}
