"""The vision half of the script for the paper's tables, on images in folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from mq_ao import MqAoError
from mq_ao.models import Vim, VimConfig

Image = pytest.importorskip("PIL.Image", reason="needs pillow")

CLASSES = ("n01", "n02", "n03")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "examples"), *sys.path])
    import paper_table_vision

    return paper_table_vision


def images(folder: Path, count: int, seed: int) -> Path:
    draw = numpy.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shape = (20 + index, 26, 3) if index % 2 else (24, 20)  # colours, and shades of grey
            Image.fromarray(draw.integers(0, 256, shape, dtype=numpy.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_it_goes_on_from_where_it_was(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    vim = Vim(VimConfig(image_size=16, patch_size=4, num_classes=3, d_model=32, n_layer=2)).eval()
    torch.save({"model": vim.state_dict()}, tmp_path / "vim.pth")
    given = {"images": images(tmp_path / "val", 5, 0), "calibration": images(tmp_path / "train", 4, 1), "count": 8}
    given |= {"recipes": "rtn-w8a8", "image_size": 16, "batch": 4, "output": tmp_path / "table"}
    script.main([str(tmp_path / "vim.pth")], **given, stride=None, limit=None)
    first = capsys.readouterr().out
    right = sum(
        int(vim(pixels).argmax(-1) == labels) for pixels, labels in script.ImageFolder(tmp_path / "val").batches(16, 1)
    )
    assert f"{100 * right / 15:.1f}" in first and "rtn-w8a8" in first
    monkeypatch.setattr(script, "accuracy", None)  # what is known is not measured again
    script.main([str(tmp_path / "vim.pth")], **given, stride=None, limit=None)
    assert capsys.readouterr().out == first


def test_images_are_cut_and_normalised(script: Any, tmp_path: Path) -> None:
    folder = images(tmp_path / "val", 3, 0)
    data = script.ImageFolder(folder, limit=6)
    assert len(data) == 6 and data.classes == 3
    (pixels, labels), *_ = data.batches(16, 6)
    assert pixels.shape == (6, 3, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    Image.new("RGB", (40, 30), (255, 0, 0)).save(folder / "n01" / "0.png")
    (pixels, _), *_ = script.ImageFolder(folder, limit=1).batches(16, 1)
    red = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(pixels[0], red[:, None, None].expand(3, 16, 16))


def test_what_is_refused(script: Any, tmp_path: Path) -> None:
    folder = images(tmp_path / "val", 1, 0)
    with pytest.raises(MqAoError, match="has no folders with images"):
        script.ImageFolder(folder / "n01")
    (folder / "n01" / "0.png").write_bytes(b"no image")
    with pytest.raises(MqAoError, match=r"0\.png is no image that can be read"):
        next(script.ImageFolder(folder).batches(16, 3))
    given = {"count": 1, "recipes": "rtn-w8a8", "output": tmp_path / "table"}
    with pytest.raises(MqAoError, match="are one folder"):
        script.main(["demo"], images=folder, calibration=folder, **given)
    with pytest.raises(MqAoError, match="demo tells 10 classes, and .* has 3"):
        shape = {"image_size": None, "stride": None, "limit": None}
        script.main(["demo"], images=folder, calibration=images(tmp_path / "train", 1, 1), **given, **shape)
