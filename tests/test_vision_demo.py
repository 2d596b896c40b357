"""The bundled image classifier: what ships, how well it survives quantization, and the command that shows it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mq_ao
from mq_ao.classify import Comparison, compare, log_probabilities
from mq_ao.cli import demo_vision
from mq_ao.lowering import inductor
from mq_ao.models import Vim, vision_demo
from tests.conftest import CommandLine

IMAGES = 250
"""Of the 1,000 that ship; `examples/vim_fashion.py` takes all 10,000."""

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(vision_demo.IMAGES)


@pytest.fixture(scope="module")
def kept(stored: dict[str, Tensor]) -> Callable[[str], Comparison]:
    """What a recipe keeps of the trained model, in integers."""
    model = Vim.from_pretrained("demo")
    images = vision_demo.normalised(stored["test_images"][:IMAGES])
    labels = stored["test_labels"][:IMAGES].long()
    reference = log_probabilities(model, images)
    calibration = [(vision_demo.normalised(stored["calibration_images"]),)]

    def measure(recipe: str) -> Comparison:
        graph = inductor.rewrite(mq_ao.quantize(model, calibration, recipe).converted)
        assert graph.simulated == []
        return compare(log_probabilities(graph.module, images), reference, labels)

    return measure


def test_what_ships(stored: dict[str, Tensor]) -> None:
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        "test_images": ((1000, 28, 28), torch.uint8),
        "test_labels": ((1000,), torch.uint8),
        "calibration_images": ((256, 28, 28), torch.uint8),
    }
    files = [path for path in vision_demo.FOLDER.iterdir() if path.suffix != ".py" and path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4e6
    assert sum(p.numel() for p in Vim.from_pretrained("demo").parameters()) < 1e6


def test_the_card_tells_the_accuracy(stored: dict[str, Tensor]) -> None:
    card = (vision_demo.FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"10,000 test images \| \*\*([\d.]+)%", card)
    images = vision_demo.normalised(stored["test_images"])
    classes = log_probabilities(Vim.from_pretrained("demo"), images).argmax(-1)
    right = float((classes == stored["test_labels"]).double().mean())
    assert float(told) >= 90
    # The shipped images are the first of those 10,000: two standard deviations of a mean of 1,000.
    assert right == pytest.approx(float(told) / 100, abs=2 * (0.1 * 0.9 / 1000) ** 0.5)


def test_int8_keeps_the_classifier(kept: Callable[[str], Comparison]) -> None:
    production, plain = kept("mambaquant-w8a8"), kept("rtn-w8a8")
    assert production.agreement > 0.98
    # Logits of the production recipe lie much nearer to the float model's: what the method is for.
    assert production.divergence < 0.5 * plain.divergence
    assert production.divergence < 1e-3


def test_int4_keeps_the_classifier(kept: Callable[[str], Comparison]) -> None:
    assert kept("mambaquant-w4a8").agreement > 0.95


def test_the_command(mq_ao: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_vision, "ROUNDS", 1)
    monkeypatch.setattr(demo_vision, "IMAGES", 64)
    result = mq_ao("demo", "--vision")
    assert result.code == 0
    for wanted in ("accuracy", "rtn-w8a8", "quarot-w8a8", "mambaquant-w8a8", "qselective_scan", "64 images"):
        assert wanted in result.out, wanted
