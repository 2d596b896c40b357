"""The bundled model: it is real, small, documented, and better than a compressor on text it has not seen."""

from __future__ import annotations

import ast
import math
import re
from functools import cache

import pytest
import torch

from mq_ao.errors import MqAoError
from mq_ao.evaluate import bits_per_byte, xz_bits_per_byte
from mq_ao.models import MambaLM, Sampling, demo
from mq_ao.text import split_documents


@cache
def model() -> MambaLM:
    return MambaLM.from_pretrained("demo")


def test_files_are_what_the_issue_asks_for() -> None:
    assert (demo.FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    heldout, calibration = demo.HELDOUT.read_bytes(), demo.CALIBRATION.read_bytes()
    assert 180_000 <= len(heldout) <= 220_000
    assert 60_000 <= len(calibration) <= 80_000
    for document in (heldout + b"\0" + calibration).split(b"\0"):
        ast.parse(document)  # whole modules


def test_calibration_text_is_not_held_out() -> None:
    heldout = {line.strip() for line in demo.HELDOUT.read_bytes().splitlines()}
    lines = [line.strip() for line in demo.CALIBRATION.read_bytes().splitlines()]
    shared = sum(len(line) for line in lines if len(line) >= 30 and line in heldout)
    # Idioms such as `if __name__ == "__main__":` are everywhere; whole passages must not be.
    assert shared < 0.01 * sum(map(len, lines))


def test_beats_xz_as_the_card_says() -> None:
    text = demo.HELDOUT.read_bytes()
    card = (demo.FOLDER / "MODEL_CARD.md").read_text()
    ours, xz = (float(figure) for figure in re.findall(r"(\d\.\d{4}) bits per byte", card))
    assert xz == pytest.approx(xz_bits_per_byte(text), abs=6e-5)  # four decimals
    # Other kernels and CPUs add up in another order; that moves a mean over 200 kB by far less.
    assert ours == pytest.approx(bits_per_byte(model(), text), abs=1e-3)
    # xz has the whole text to look back to; the model starts anew with every document.
    assert ours < 0.9 * xz
    for word in ("Python Software Foundation", "seed", "held-out text |", "wall time", "statistics"):
        assert word in card


def test_writes_python() -> None:
    prompt = b"\0import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n"
    ids = torch.tensor([list(prompt)])
    text = bytes(model().generate(ids, 200, Sampling(temperature=0.3, seed=0))[0, len(prompt) :].tolist()).decode()
    assert "self." in text and "    def " in text


def test_bits_per_byte_do_not_depend_on_the_chunk() -> None:
    text = demo.CALIBRATION.read_bytes()[:500] + b"\0" + demo.CALIBRATION.read_bytes()[-300:]
    done: list[int] = []
    whole = bits_per_byte(model(), text, progress=done.append)
    assert sum(done) == len(text) == 801
    # float32, in another order of summation.
    assert bits_per_byte(model(), text, chunk=7) == pytest.approx(whole, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model_are_eight() -> None:
    def uniform(ids: torch.Tensor, *states: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.zeros(*ids.shape, 256), torch.zeros(1), torch.zeros(1)

    assert math.isclose(bits_per_byte(uniform, b"anything\0else"), 8, rel_tol=1e-6)


@pytest.mark.parametrize("text", [b"a", b"a\0", b"\0", b"a\0b", b"\0\0a\0", b""])
def test_documents_join_to_the_text(text: bytes) -> None:
    documents = split_documents(text)
    assert b"".join(documents) == text
    assert all(document.count(b"\0") <= 1 and b"\0" not in document[:-1] for document in documents)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(MqAoError, match="empty"):
        bits_per_byte(model(), b"")
    with pytest.raises(MqAoError, match="chunk"):
        bits_per_byte(model(), b"a", chunk=0)
