"""The package as users get it: editable, wheel, source distribution, and a checkout where a wheel is installed."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As pip builds without isolation: the build tool is installed, and no network is needed.
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""
HOMES = """
import mq_ao, mq_ao.quantizer, mq_ao.lowering.inductor, mq_ao.ops.native, mq_ao.models.demo
from pathlib import Path
mq_ao.quantize
for module in (mq_ao, mq_ao.quantizer, mq_ao.lowering.inductor, mq_ao.ops.native, mq_ao.models.demo):
    print(Path(module.__file__).resolve().parent)
"""


def run(
    *command: str | Path, cwd: Path, stdin: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a command as a shell without our variables would."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=inherited,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def tracked(*folders: str) -> set[str]:
    listed = run("git", "ls-files", "-z", *folders, cwd=ROOT).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the source distribution and the wheel; what setuptools warns of is an error."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    shutil.copytree(source, copy)
    log = run(sys.executable, "-W", "error", "-c", BUILD, folder, cwd=copy)
    assert "warning" not in (log.stdout + log.stderr).lower()
    shutil.rmtree(copy)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture
def unpacked(built: Path, tmp_path: Path) -> Path:
    """The source distribution's folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.iterdir())


def environment(folder: Path, *requirement: str | Path) -> Path:
    """The Python of a new environment: this one's packages without mq-ao, and what `pip install` is told."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip())
    # The hooks of these folders are not run, an editable mq-ao's among them.
    packages.joinpath("others.pth").write_text("\n".join(site.getsitepackages()))
    if requirement:
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, *requirement, cwd=folder)
    return python


def homes(python: Path, cwd: Path) -> list[Path]:
    return [Path(line) for line in run(python, "-c", HOMES, cwd=cwd).stdout.split()]


def beside(root: Path) -> list[Path]:
    """Where packages lie in a checkout."""
    names = ("mq_ao", "quantizer", "lowering/inductor", "mq_ao/ops/native", "mq_ao/models/demo")
    return [root / name for name in names]


def inside(packages: Path) -> list[Path]:
    """Where packages lie once a wheel is installed."""
    names = ("", "quantizer", "lowering/inductor", "ops/native", "models/demo")
    return [packages / "mq_ao" / name for name in names]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel."""
    return environment(tmp_path_factory.mktemp("installed"), wheel)


def test_wheel(installed: Path, tmp_path: Path) -> None:
    package, *others = homes(installed, tmp_path)
    assert installed.parents[1] in package.parents
    assert [package, *others] == inside(package.parent)
    assert run(installed.with_name("mq-ao"), "--version", cwd=tmp_path).stdout == "mq-ao 0.1.0\n"


@pytest.mark.parametrize("way", ["-c", "-", "-m"])
def test_a_checkout_where_a_wheel_is_installed(way: str, installed: Path, source: Path) -> None:
    """Its folder comes first on the path, and all parts come from it."""
    if way == "-c":
        assert homes(installed, source) == beside(source)
    elif way == "-":
        assert run(installed, "-", cwd=source, stdin=HOMES).stdout.split() == [str(path) for path in beside(source)]
    else:
        assert run(installed, "-m", "mq_ao", "--version", cwd=source).stdout == "mq-ao 0.1.0\n"
        run(installed, "-m", "mq_ao.quantizer.specs", cwd=source)


def test_editable(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    python = environment(tmp_path / "environment", "--editable", copy)
    assert homes(python, tmp_path) == beside(copy)


def test_a_wheel_of_the_source_distribution(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*build, "--wheel-dir", tmp_path, unpacked, cwd=tmp_path)
    again = next(tmp_path.glob("*.whl"))
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_the_source_distribution_holds_every_file(unpacked: Path) -> None:
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("mq_ao.egg-info/")}
    assert names - made == tracked()


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    """Kernels' sources, the bundled models and their texts too."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        name if name.startswith("mq_ao/") else f"mq_ao/{name}" for name in tracked("mq_ao", "quantizer", "lowering")
    }
    assert names == expected
    assert {"mq_ao/py.typed", "mq_ao/ops/native/executorch/CMakeLists.txt", "mq_ao/lowering/__init__.py"} <= names


def test_every_folder_is_a_package() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent.as_posix() for name in tracked("mq_ao", "quantizer", "lowering")}
    assert set(configured) == {
        (folder if folder.startswith("mq_ao") else f"mq_ao/{folder}").replace("/", ".") for folder in folders
    }


def test_only_these_two_are_found_beside_the_package() -> None:
    import mq_ao

    for name in ("tests", "examples", "mq_ao", "build", "missing"):
        with pytest.raises(AttributeError, match=f"module 'mq_ao' has no attribute '{name}'"):
            getattr(mq_ao, name)


@pytest.mark.parametrize("missing", ["torchao.quantization.pt2e.quantizer", "torch"])
def test_a_missing_dependency_is_named(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; import mq_ao; mq_ao.quantizer"
    failed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert failed.stderr.splitlines()[-1] == f"ModuleNotFoundError: import of {missing} halted; None in sys.modules"
