"""lm-evaluation-harness on our models: against its own model class for transformers, and on tasks in local files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mq_ao import MqAoError
from mq_ao.evaluate import bits_per_byte
from mq_ao.models import MambaLM, demo
from tests import test_tokenizer
from tests.conftest import CommandLine, error
from tests.test_capture_transformers import build
from tests.test_extras import run as run_without
from tests.test_tokenizer import WORDS

pytest.importorskip("lm_eval", reason='needs pip install "mq-ao[eval]"')

from lm_eval.api.instance import Instance

from mq_ao.integrations.lm_eval import MqAoLM

words = test_tokenizer.words  # a fixture
CHOICES = [
    {"question": "import os\nimport ", "choices": ["sys\n", "zqx\n"], "answer": 0},
    {"question": "def f(self", "choices": ["((", "):\n", "]:\n"], "answer": 1},
    {"question": "for i in range(10", "choices": ["}}", "):\n"], "answer": 1},
    {"question": "    return ", "choices": ["\x07\x07", "self"], "answer": 0},
]
CLOZE = [{"text": "import os\nimport sys"}, {"text": "class A:\n    def __init__(self"}]
MULTIPLE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {folder}/choice.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITTEN = """
task: local_cloze
dataset_path: json
dataset_kwargs: {{data_files: {folder}/cloze.jsonl}}
test_split: train
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{rest}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("choice", CHOICES), ("cloze", CLOZE)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(MULTIPLE.format(folder=folder))
    return folder


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def byte_model() -> MqAoLM:
    return MqAoLM("demo")


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Bamba", "FalconMamba"])
def test_scores_and_texts_are_those_of_lm_evals_own_model(name: str, words: Any, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = build(name)
    words.eos_token = "<s>"
    model.save_pretrained(tmp_path / name)
    words.save_pretrained(tmp_path / name)
    ours = MqAoLM(str(tmp_path / name))
    theirs = HFLM(pretrained=model, tokenizer=words, batch_size=1, max_length=256, device="cpu")
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    pairs = [("w1 w2 w3", " w4 w5"), ("w1 w2 w3", " w9"), ("w7", " w8 w8 w8"), ("", "w3 w4"), ("w1 w2 ", "w6")]
    scores = [lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for lm in (ours, theirs)]
    for (got, greedy), (wanted, wanted_greedy) in zip(*scores, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4) and greedy == wanted_greedy
    texts = [(" ".join(WORDS[start : start + 20]),) for start in (0, 13)]
    rolled = [
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True) for lm in (ours, theirs)
    ]
    assert rolled[0] == pytest.approx(rolled[1], rel=1e-4)
    options = {"until": ["w5 ", "\n"], "max_gen_toks": 12, "do_sample": False}
    written = [
        lm.generate_until(requests("generate_until", ("w1 w2 w3", options)), disable_tqdm=True) for lm in (ours, theirs)
    ]
    # Theirs is decoded by itself, where a first word has no space before it.
    assert [text.strip() for text in written[0]] == [text.strip() for text in written[1]]


def test_rolling_is_mq_ao_eval(byte_model: MqAoLM) -> None:
    text = demo.HELDOUT.read_bytes()[:3000].split(b"\0")[0]
    (got,) = byte_model.loglikelihood_rolling(requests("loglikelihood_rolling", (text.decode(),)), disable_tqdm=True)
    wanted = bits_per_byte(MambaLM.from_pretrained("demo"), text)
    assert -got / math.log(2) / len(text) == pytest.approx(wanted, rel=1e-5)


def test_tasks_of_every_kind(byte_model: MqAoLM, tasks: Path, mq_ao: CommandLine) -> None:
    run = mq_ao("eval", "demo", "--tasks", "local_choice", "--include-path", tasks, "--json", "-")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    accuracy, deviation = found["tasks"]["local_choice"]["acc"]
    assert accuracy >= 0.75 and deviation is not None and found["weight_bytes"] > 0
    rolling = WRITTEN.format(
        folder=tasks,
        kind="loglikelihood_rolling",
        text="",
        target="{{text}}",
        rest="metric_list: [{metric: bits_per_byte}]",
    )
    (tasks / "cloze.yaml").write_text(rolling)
    run = mq_ao("eval", "demo", "--tasks", "local_choice,local_cloze", "--include-path", tasks, "--limit", "1")
    assert run.code == 0, run.err
    assert "local_cloze" in run.out and "bits_per_byte" in run.out
    stops = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]'
    writing = WRITTEN.format(folder=tasks, kind="generate_until", text="{{text}}", target="{{text}}", rest=stops)
    (tasks / "cloze.yaml").write_text(writing)
    run = mq_ao("eval", "demo", "--tasks", "local_cloze", "--include-path", tasks, "--json", "-")
    assert run.code == 0, run.err
    assert json.loads(run.out)["tasks"]["local_cloze"]["exact_match"][0] == 0.0


def test_the_table_goes_on_from_where_it_was(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "examples"), *sys.path])
    import paper_table

    given: dict[str, Any] = {"tokens": 2048, "recipes": "rtn-w8a8", "tasks": "local_choice", "include_path": tasks}
    given |= {"backend": "cuda", "output": tmp_path / "table"}
    paper_table.main(["demo"], **given)
    first = capsys.readouterr().out
    assert "rtn-w8a8" in first and "float32" in first and (tmp_path / "table" / "demo-rtn-w8a8.ptc").is_file()

    def never(*args: Any) -> Any:
        raise AssertionError("what is known is not measured again")

    monkeypatch.setattr(paper_table, "measured", never)
    paper_table.main(["demo"], **given)
    assert capsys.readouterr().out == first


def test_lm_evals_own_command_knows_the_model(tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mq_ao.integrations.lm_eval", "run", "--model", "mq-ao", "--model_args"]
    command += ["pretrained=demo", "--tasks", "local_choice", "--include_path", str(tasks)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_choice" in done.stdout and "acc" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "no_such_task"), "lm-evaluation-harness has no task no_such_task: `lm_eval ls tasks` lists those"),
        (("--tasks", " , "), "there is no task: name some"),
        (("--tasks", "arc_easy", "--window", "3"), "--window is for a text, and --tasks runs tasks"),
        (("--limit", "3"), "are for tasks: name some with --tasks"),
    ],
)
def test_bad_input_is_one_sentence(mq_ao: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    assert message in error(mq_ao("eval", "demo", *arguments))


def test_bad_requests(byte_model: MqAoLM) -> None:
    with pytest.raises(MqAoError, match="generation options beams are not known"):
        byte_model.generate_until(requests("generate_until", ("a", {"beams": 3})), disable_tqdm=True)
    with pytest.raises(MqAoError, match="batch_size is 0"):
        MqAoLM("demo", batch_size=0)
    with pytest.raises(MqAoError, match="has no chat template"):
        byte_model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert byte_model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0.0]


def test_without_lm_eval(tmp_path: Path) -> None:
    arguments = ["mq-ao", "eval", "demo", "--tasks", "arc_easy"]
    done = run_without(f"sys.argv = {arguments}\nfrom mq_ao.cli import main; main()", tmp_path, "lm_eval")
    assert done.returncode == 2
    assert 'lm-evaluation-harness needs lm_eval: run pip install "mq-ao[eval]".' in done.stderr


def test_integers_and_floats_answer_alike(tasks: Path, tmp_path: Path, mq_ao: CommandLine) -> None:
    """A saved program keeps its states, its tokens are bytes."""
    path = tmp_path / "demo.ptc"
    assert mq_ao("quantize", "demo", "--backend", "cuda", "--tokens", "2048", "-o", path).code == 0
    run = mq_ao("eval", path, "--tasks", "local_choice", "--include-path", tasks, "--json", "-")
    assert run.code == 0, run.err
    assert json.loads(run.out)["tasks"]["local_choice"]["acc"][0] >= 0.75
