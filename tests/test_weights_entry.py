"""Weights in an archive: what is written comes back, on the file's own pages, and damage is told."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mq_ao import MqAoError
from mq_ao.lowering.inductor import weights

TIED = torch.arange(12.0)
TENSORS = {
    "b": torch.tensor([[1, -2], [3, 4]], dtype=torch.int8),
    "a.long": torch.arange(3),
    "tied": TIED,
    "tied.too": TIED,
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 3),
    "flag": torch.tensor([True, False]),
    "half": torch.randn(5).bfloat16(),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "program.pt2", "w") as file:
        file.writestr("program/archive_format", "pt2")
    weights.add(tmp_path / "program.pt2", TENSORS)
    return tmp_path / "program.pt2"


def test_what_is_written_comes_back(path: Path) -> None:
    found = weights.mapped(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    # Where a line of the cache begins, and no byte is copied: one storage, that of the file.
    assert found["a.long"].data_ptr() % 64 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert found["b"].untyped_storage().nbytes() >= path.stat().st_size - 4096
    found["b"].zero_()  # stays in memory
    assert torch.equal(weights.mapped(path)["b"], TENSORS["b"])
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        from safetensors.torch import load

        assert load(file.read(f"program/{weights.NAME}")).keys() == TENSORS.keys()


@pytest.mark.parametrize("damage", ["missing", "compressed", "header", "offsets", "cut"])
def test_damage_is_told(path: Path, damage: str) -> None:
    with zipfile.ZipFile(path) as file:
        content = file.read(f"program/{weights.NAME}")
    changed = {
        "missing": b"",
        "compressed": content,
        "header": b"\xff" * 8 + content[8:],
        "offsets": content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        "cut": content[:-20],
    }[damage]
    method = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
    name = "other" if damage == "missing" else weights.NAME
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("program/archive_format", "pt2")
        file.writestr(f"program/{name}", changed)
    with pytest.raises(MqAoError, match=r"the weights of .*program\.pt2 are damaged"):
        weights.mapped(path)


def test_to_load_a_program_imports_nothing_that_makes_one() -> None:
    script = (
        "import sys, mq_ao, mq_ao.loading, mq_ao.lowering.inductor\n"
        "slow = {'torchao', 'torch._dynamo', 'torch._inductor', 'sympy', 'transformers'} & sys.modules.keys()\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
