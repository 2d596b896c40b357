"""The package as users get it: editable and as a wheel, with `quantizer/` and `lowering/` under `mq_ao`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import mq_ao, mq_ao.quantizer, mq_ao.lowering.inductor, mq_ao.ops.native, mq_ao.models.demo
from pathlib import Path
for module in (mq_ao, mq_ao.quantizer, mq_ao.lowering, mq_ao.ops.native, mq_ao.models.demo):
    print(Path(module.__file__).resolve().parent)
"""


def imported_from(cwd: Path, **environment: str) -> list[Path]:
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, check=True, capture_output=True, text=True, timeout=300
    )
    return [Path(line) for line in result.stdout.split()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation: the build tool is installed, and no network is needed.
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, "--wheel-dir", str(folder), str(copy)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_editable(tmp_path: Path) -> None:
    package, quantizer, lowering, native, demo = imported_from(tmp_path)
    assert package == ROOT / "mq_ao"
    assert (quantizer, lowering) == (ROOT / "quantizer", ROOT / "lowering")
    assert (native, demo) == (package / "ops" / "native", package / "models" / "demo")


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    package, quantizer, lowering, native, demo = imported_from(tmp_path, PYTHONPATH=str(site))
    assert package == site / "mq_ao"
    assert (quantizer, lowering) == (package / "quantizer", package / "lowering")
    # What is not Python travels too: kernels' sources, the bundled model and its texts.
    for folder, source in ((native, "mq_ao/ops/native"), (native / "executorch", "mq_ao/ops/native/executorch")):
        for kind in ("*.cpp", "*.h", "CMakeLists.txt"):
            assert {path.name for path in folder.glob(kind)} == {path.name for path in (ROOT / source).glob(kind)}
    for name in ("model.safetensors", "config.json", "heldout.txt", "calibration.txt", "MODEL_CARD.md"):
        assert (demo / name).is_file()
    assert (package / "py.typed").is_file()


def test_wheel_holds_every_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (("mq_ao", "mq_ao"), ("quantizer", "mq_ao/quantizer"), ("lowering", "mq_ao/lowering")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{target}/{path.relative_to(ROOT / folder).as_posix()}" in names
