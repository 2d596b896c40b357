"""Building, caching and loading of the native kernels, mostly with a pretended compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mq_ao.errors import MqAoError
from mq_ao.ops.native import build, executorch_build

# Logs each call but the one that asks for macros, and writes something where `-o` points.
COMPILER = """#!/bin/sh
case "$*" in *-dM*) echo "#define PRETENDED 1"; exit 0;; esac
echo "$*" >> "$(dirname "$0")/calls"
while [ "$1" != "-o" ]; do shift; done
echo built > "$2"
"""
BROKEN = """#!/bin/sh
case "$*" in *-dM*) exit 0;; esac
echo "vec.h:1: error: this compiler is broken" >&2
exit 3
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended compiler, and an empty cache."""
    return pretend(tmp_path, monkeypatch, COMPILER)


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    program = tmp_path / "pretended-c++"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("MQ_AO_CACHE", str(tmp_path / "cache"))
    return program


def calls(compiler: Path) -> int:
    return len((compiler.parent / "calls").read_text().splitlines())


def test_builds_once_and_then_finds_it(compiler: Path) -> None:
    assert build.cached() is None
    path = build.build()
    steps = len(list(Path(build.__file__).parent.glob("*.cpp"))) + 2  # the common header, and the link
    assert calls(compiler) == steps
    assert Path(path).read_text() == "built\n"
    assert [p.name for p in Path(path).parent.iterdir()] == [Path(path).name]
    assert build.cached() == build.build() == path
    assert calls(compiler) == steps
    assert build.build(force=True) == path
    assert calls(compiler) == 2 * steps


def test_another_compiler_or_source_is_another_build(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build()
    compiler.write_text(COMPILER.replace("PRETENDED 1", "PRETENDED 2"))
    assert build.cached() is None
    compiler.write_text(COMPILER)
    assert build.cached() == path
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in [*Path(build.__file__).parent.glob("*.cpp"), *Path(build.__file__).parent.glob("*.h")]:
        (sources / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "_HERE", sources)
    assert build.cached() == path
    (sources / "vec.h").write_text((sources / "vec.h").read_text() + "\n")
    assert build.cached() is None


def test_broken_compiler_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, BROKEN)
    with pytest.raises(MqAoError, match=r"exit code 3(.|\n)*this compiler is broken"):
        build.build()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(MqAoError, match=r"no C\+\+ compiler found .*absent.*install g\+\+"):
        build.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MqAoError, match=r"looked for g\+\+, clang\+\+, c\+\+"):
        build.build()
    assert build.cached() is None


def test_cache_that_cannot_be_written(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MQ_AO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MqAoError, match="set MQ_AO_CACHE"):
        build.build()


def test_executorch_kernels_are_another_library(compiler: Path) -> None:
    pytest.importorskip("executorch.exir", reason='needs executorch: pip install "mq-ao[executorch]"')
    assert executorch_build.cached() is None
    path = executorch_build.build()
    assert calls(compiler) == len(list((Path(build.__file__).parent / "executorch").glob("*.cpp"))) + 1
    assert Path(path).name == "libmq_ao_executorch.so"
    assert executorch_build.cached() == executorch_build.build() == path
    assert build.cached() is None


def test_a_missing_executorch_is_said(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (executorch_build.build, executorch_build.cached):
        with pytest.raises(MqAoError, match=r'install it with pip install "mq-ao\[executorch\]"'):
            call()
    assert not (compiler.parent / "calls").exists()


FALLBACK = """
import warnings
import torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import mq_ao.ops
    for _ in range(2):
        y, state = torch.ops.mq_ao.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2))
assert not mq_ao.ops.native_available()
assert y[0, :, 0].tolist() == [1.0, 2.0, 2.0] and state.tolist() == [[[1.0, 1.0]]], (y, state)
x = torch.ones(1, 3, 2, requires_grad=True)
torch.ops.mq_ao.causal_conv1d(x, torch.ones(2, 2))[0].sum().backward()
assert x.grad[0, :, 0].tolist() == [2.0, 2.0, 1.0]
ours = [str(w.message) for w in seen if "mq_ao" in str(w.message)]
assert len(ours) == 1, ours
print(ours[0])
"""


def fallback(environment: dict[str, str]) -> str:
    """Runs FALLBACK in a fresh process and returns the one warning."""
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_the_references_run_after_one_warning(tmp_path: Path) -> None:
    warning = fallback({"CXX": str(tmp_path / "absent"), "MQ_AO_CACHE": str(tmp_path)})
    assert "slow reference operators" in warning and "install g++" in warning and "build-kernels" in warning


def test_a_library_that_does_not_load_is_not_fatal(compiler: Path, tmp_path: Path) -> None:
    build.build()
    warning = fallback({"CXX": str(compiler), "MQ_AO_CACHE": str(tmp_path / "cache")})
    assert "slow reference operators" in warning
