"""What `pip install mq-ao` alone brings is enough to quantize and lower; what needs an extra says which."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mq_ao import MqAoError
from mq_ao.extras import needs
from mq_ao.progress import with_bar
from tests.test_packaging import tracked

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NAMED = re.compile(r"mq-ao\[([\w,]+)\]")

# These modules are found where a package brings its own copy alone, as setuptools does of some.
BLOCKED = """
import sys
from importlib.machinery import PathFinder

MISSING = set(sys.argv.pop().split(","))
find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    if name in MISSING and path is None:
        path = [folder for folder in sys.path if not folder.endswith("-packages")]
    return find(name, path, target)

PathFinder.find_spec = find_spec
"""
WALK = """
import torch
import mq_ao, mq_ao.ablation, mq_ao.roofline
from mq_ao.models import MambaConfig, MambaLM

torch.manual_seed(0)
ids = torch.randint(0, 256, (2, 32))
model = MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)).eval()
q = mq_ao.quantize(model, [ids, ids], "rtn-w8a8", progress=True)
print(q.report())

def refusal(call):
    try:
        call()
    except mq_ao.MqAoError as error:
        print(error)

from pathlib import Path
refusal(lambda: q.report(html="report.html"))
refusal(lambda: mq_ao.ablation.save_plot([], Path("plot.svg")))
program = q.lower()
print(program(ids)[0].shape, dict(program.integer_kernels))
"""


def brought_along(requirements: Iterable[str]) -> set[str]:
    """The distributions that an installation of these brings, as far as they are here."""
    found: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        item, extra = left.pop()
        if item.marker is not None and not item.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(item.name)
        for wanted in {"", *item.extras} - {extra for known, extra in found if known == name}:
            found.add((name, wanted))
            try:
                left += [(Requirement(text), wanted) for text in importlib.metadata.requires(name) or []]
            except importlib.metadata.PackageNotFoundError:
                break
    return {name for name, _ in found}


def missing() -> set[str]:
    """Modules of this environment that the base installation would not have."""
    base = brought_along(PROJECT["dependencies"])
    found = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if module != "mq_ao" and not {canonicalize_name(owner) for owner in owners} & base
    }
    # PyTorch brings it along; that is no promise.
    return found | {"jinja2"}


def run(script: str, folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Runs a script where these modules cannot be imported."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + script, ",".join(names)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_base_installation_quantizes_and_lowers(tmp_path: Path) -> None:
    blocked = missing()
    assert {"typer", "rich", "matplotlib", "jinja2", "ninja", "pytest"} <= blocked
    assert not {"torch", "torchao", "numpy", "safetensors", "yaml", "setuptools", "sympy"} & blocked
    done = run(WALK, tmp_path, *blocked)
    assert done.returncode == 0, done.stderr
    *report, page, plot, program = done.stdout.splitlines()
    assert report[0] == "recipe rtn-w8a8" and any("quantized" in line for line in report)
    assert page == 'the page of a report needs matplotlib: run pip install "mq-ao[report]".'
    assert plot == 'a plot needs matplotlib: run pip install "mq-ao[report]".'
    assert program.startswith("torch.Size([2, 32, 256]) {'mq_ao.qrms_norm.default'")
    assert "calibrating: 2 done" in done.stderr.splitlines()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_the_command_line_without_its_extra_is_one_sentence(tmp_path: Path, name: str) -> None:
    done = run("from mq_ao.cli import main; main()", tmp_path, name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'error: the command line needs {name}: run pip install "mq-ao[cli]".\n'


def test_a_page_is_asked_for_before_anything_takes_long(tmp_path: Path) -> None:
    arguments = ["mq-ao", "quantize", "demo", "--report", "report.html", "-o", "demo.pt2"]
    done = run(f"sys.argv = {arguments}\nfrom mq_ao.cli import main; main()", tmp_path, "jinja2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == 'error: the page of a report needs jinja2: run pip install "mq-ao[report]".'


def test_only_missing_packages_are_told_of() -> None:
    with (
        pytest.raises(MqAoError, match=r'^this needs no_such: run pip install "mq-ao\[cli\]"\.$'),
        needs("this", "cli"),
    ):
        import no_such.module
    with pytest.raises(ImportError, match="cannot import name"), needs("this", "cli"):
        from math import no_such  # noqa: F401


def test_progress_without_rich_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert list(with_bar(iter("ab"), "reading", shown=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
    assert list(with_bar(iter("ab"), "reading", shown=True)) == ["a", "b"]
    assert capsys.readouterr().err == "reading: 2 done\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_bar(iter("ab"), "reading", shown=True)) == ["a", "b"]
    assert capsys.readouterr().err == "\rreading: 1\rreading: 2\n"


def test_the_extras_that_are_named_exist() -> None:
    """In messages, documents and other extras."""
    named: dict[str, set[str]] = {}
    for name in tracked():
        if name.endswith((".py", ".md", ".toml", ".txt", "Makefile")) and not name.startswith("mq_ao/models/"):
            for extras in NAMED.findall((ROOT / name).read_text(encoding="utf-8")):
                for extra in extras.split(","):
                    named.setdefault(extra, set()).add(name)
    assert {"cli", "report", "executorch", "hf", "peers"} <= named.keys()
    assert named.keys() <= EXTRAS.keys(), named


def test_the_tests_have_the_extras_of_every_command() -> None:
    for extra in ("all", "dev"):
        own = {item for text in EXTRAS[extra] for names in NAMED.findall(text) for item in names.split(",")}
        assert {"cli", "report", "executorch", "hf"} <= own, extra
