"""The training script: nothing held out is trained on, batches are a function of the step, and it really runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mq_ao.models import MambaLM

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_corpus  # noqa: E402  (an example, not part of the package)
import training  # noqa: E402


@pytest.fixture(scope="module")
def corpus() -> demo_corpus.Corpus:
    return demo_corpus.collect()


def test_held_out_documents_are_not_trained_on(corpus: demo_corpus.Corpus) -> None:
    train = set(corpus.train)
    assert not train & set(corpus.heldout)
    assert set(corpus.calibration) <= train and set(corpus.modules) < train
    assert 180_000 < sum(map(len, corpus.heldout)) < 230_000
    # Near copies would show here: licence lines and idioms make up about one percent.
    assert demo_corpus.repeated_lines(corpus.train, corpus.heldout) < 0.03


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("test/test_csv.py", True),
        ("test/test_statistics.py", True),
        ("test/test_tempfile_more.py", True),
        ("test/test_shlex/__init__.py", True),
        ("test/test_csvx.py", False),
        ("test/test_calendar.py", False),
        ("csv.py", False),
        ("asyncio/test_csv.py", False),
    ],
)
def test_tests_of_held_out_modules_are_recognised(path: str, held_out: bool) -> None:
    assert demo_corpus.tests_held_out(path) == held_out


def test_files_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    for name in (*demo_corpus.HELD_OUT, *demo_corpus.CALIBRATION):
        (tmp_path / f"{name}.py").write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9t\xe9\n")
    (tmp_path / "zero.py").write_bytes(b"a\0b")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_csv.py").write_text("import csv\n")
    (tmp_path / "test" / "test_cmd.py").write_text("import cmd\n")
    corpus = demo_corpus.collect(tmp_path)
    assert corpus.modules == [f"# {name}\n".encode() for name in demo_corpus.CALIBRATION]
    assert corpus.train == [*corpus.modules, b"import cmd\n"]


def test_an_epoch_visits_every_window_once_and_a_batch_depends_on_its_step_alone() -> None:
    text = demo_corpus.joined([bytes(range(1, 251)), bytes(range(1, 151))])
    batches = training.Batches(text, length=10, batch=3, seed=0)
    steps = [batches(step) for step in range(30)]
    starts = [tuple(row.tolist()) for inputs, _ in steps for row in inputs]
    assert len(set(starts[: batches.windows])) == batches.windows
    assert set(starts[: batches.windows]) != set(starts[batches.windows : 2 * batches.windows])
    for inputs, targets in steps:
        assert inputs.shape == targets.shape == (3, 10)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again = training.Batches(text, length=10, batch=3, seed=0)
    for step in (29, 3, 17):
        assert all(torch.equal(a, b) for a, b in zip(again(step), steps[step], strict=True))


def run(*options: str) -> str:
    script = [sys.executable, str(EXAMPLES / "train_demo_lm.py"), *options]
    result = subprocess.run(
        script, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"COLUMNS": "200"}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_trains_resumes_and_writes_a_model_that_loads(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--d-model", "16", "--layers", "1", "--length", "64", "--batch", "4"]
    run(*options, "--steps", "2", "--minutes", "5")
    output = run(*options, "--steps", "5", "--minutes", "5", "--resume")
    assert "step 2" in output and "step 5 held-out" in output
    folder = tmp_path / "demo"
    assert sorted(os.listdir(folder)) == [
        "MODEL_CARD.md",
        "calibration.txt",
        "config.json",
        "heldout.txt",
        "model.safetensors",
    ]
    model = MambaLM.from_pretrained(folder)
    assert model.config.d_model == 16
    card = (folder / "MODEL_CARD.md").read_text()
    figure = re.search(r"\*\*(\d\.\d+) bits per byte", card)
    assert figure and float(figure[1]) < 9  # five steps do not learn much
    assert "| steps, windows a step, bytes a window | 5, 4, 64 |" in card
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 5


def test_says_what_it_takes() -> None:
    output = run("--help")
    assert "--until" in output and "--resume" in output
