"""The pages of docs/ that are made of the code: `python -m tests.reference_pages` writes them, and a test compares."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mq_ao.recipes import RECIPES

DOCS = Path(__file__).parents[1] / "docs"
MADE = "*Made of the code by `python -m tests.reference_pages`; a test compares it.*"


def commands() -> str:
    """Every command with its options and examples, as typer documents them."""
    call = (sys.executable, "-m", "typer", "mq_ao.cli.app", "utils", "docs", "--name", "mq-ao")
    made = subprocess.run(call, capture_output=True, text=True, check=True, cwd=DOCS.parent).stdout
    text = html.unescape(made).replace("# `mq-ao`\n", f"# Commands\n\n{MADE}\n", 1)
    text = text.replace("```console\n$ ", "```text\n")
    # typer writes a list of examples as paragraphs below a heading in HTML.
    examples = re.compile(r"<span [^>]*>Examples</span>\n\n(.*?)\n\n(?=\*\*Usage)", re.DOTALL)
    text = examples.sub(lambda match: f"**Examples**:\n\n```text\n{_joined(match[1])}\n```\n\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _joined(paragraphs: str) -> str:
    return "\n".join(line for line in paragraphs.splitlines() if line)


def recipes() -> str:
    """Every named recipe, as `print` shows it."""
    tables = [f"## {name}\n\n```text\n{recipe}\n```\n" for name, recipe in RECIPES.items()]
    head = f"# Recipe tables\n\n{MADE}\n\nHow to read and write recipes: [Recipes](recipes.md).\n"
    return "\n".join([head, *tables])


PAGES: Mapping[str, Callable[[], str]] = {"cli.md": commands, "recipe_tables.md": recipes}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
