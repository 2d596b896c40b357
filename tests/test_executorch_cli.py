"""`.pte` programs from the command line: made, evaluated, generated with, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.saving import save_pretrained
from tests.conftest import CommandLine, error

pytest.importorskip("executorch", reason='needs pip install "mq-ao[executorch]"')

TEXT = Path(__file__).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, and a text."""
    folder = tmp_path_factory.mktemp("pte")
    torch.manual_seed(0)
    save_pretrained(MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)), folder / "model")
    (folder / "text.txt").write_bytes(TEXT)
    return folder


def test_quantize_eval_and_generate(mq_ao: CommandLine, folder: Path) -> None:
    program, text = folder / "model.pte", folder / "text.txt"
    made = mq_ao(
        *("quantize", folder / "model", "--backend", "executorch", "--calibration", text),
        *("--max-length", "64", "-o", program),
    )
    assert made.code == 0, made.err
    assert "xnnpack linear" in made.out
    evaluated = mq_ao("eval", program, "--text", text, "--against", folder / "model", "--json", "-")
    assert evaluated.code == 0, evaluated.err
    model, quantized = json.loads(evaluated.out)["models"]
    assert quantized["bits_per_byte"] == pytest.approx(model["bits_per_byte"], rel=0.01)
    runs = [mq_ao("generate", program, "--prompt", "def ", "-n", "8") for _ in range(2)]
    assert runs[0].code == 0, runs[0].err
    assert runs[0].out.startswith("def ")
    assert runs[0].out == runs[1].out


def test_bad_input_is_one_line(mq_ao: CommandLine, folder: Path) -> None:
    model, text = folder / "model", folder / "text.txt"
    command = ("quantize", model, "--calibration", text, "--backend")
    assert "must end in .pte" in error(mq_ao(*command, "executorch", "-o", folder / "m.pt2"))
    assert "the backends are native, inductor, executorch" in error(mq_ao(*command, "tpu", "-o", folder / "m.pte"))
    wrong = mq_ao(*command, "executorch", "--scan", "fast", "-o", folder / "m.pte")
    assert "it is one of native, portable" in error(wrong)
    refused = mq_ao(*command, "executorch", "--recipe", "rtn-w8a16", "-o", folder / "m.pte")
    assert "no integer kernel for in_proj with activation none" in error(refused)
    (folder / "foreign.pte").write_bytes(b"no program")
    assert "is not a program that mq_ao made" in error(mq_ao("generate", folder / "foreign.pte", "--prompt", "a"))
    assert not (folder / "m.pte").exists()
