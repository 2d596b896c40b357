"""Makes links to files outside docs/ work on the site: the files are copied to it, under `repository/`.

On GitHub the same links lead to the files themselves.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
COPIES = "repository"
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Files that the navigation lists."""
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside docs/ that pages link to, and those that these link to in turn."""
    pending = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    pending += ALWAYS
    seen = set(pending)
    for name in pending:
        if not name.startswith("docs/"):
            files.append(File.generated(config, _on_site(name), abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            found = {_target(name, link) for link in _LINK.findall((ROOT / name).read_text(encoding="utf-8"))}
            new = sorted(target for target in found - seen if (ROOT / target).is_file())
            seen.update(new)
            pending += (target for target in new if not target.startswith("docs/"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page to where their targets lie on the site."""
    source = page.file.src_uri
    name = source.removeprefix(f"{COPIES}/") if source.startswith(f"{COPIES}/") else f"docs/{source}"
    folder = posixpath.dirname(source)

    def rewritten(match: re.Match[str]) -> str:
        target = _target(name, match[1])
        return posixpath.relpath(_on_site(target), folder or ".") if (ROOT / target).is_file() else match[1]

    return _LINK.sub(rewritten, markdown)


def _target(name: str, link: str) -> str:
    """The path in the repository that a link in the file `name` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _on_site(name: str) -> str:
    """Where a file of the repository lies on the site."""
    return name.removeprefix("docs/") if name.startswith("docs/") else f"{COPIES}/{name}"
