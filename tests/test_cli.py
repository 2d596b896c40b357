"""The command line by real runs: the demo and everything on the program that it saves, JSON, exit codes, bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
import typer

from mq_ao.cli import demo as demo_command
from mq_ao.cli import main
from mq_ao.cli.app import app
from mq_ao.models import MambaConfig, MambaLM, demo
from mq_ao.models.saving import save_pretrained
from tests.conftest import CommandLine, error
from tests.test_docs import files as documents

TEXT = Path(demo_command.__file__).read_bytes()


@dataclass(frozen=True)
class Files:
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def program(self) -> Path:
        return self.folder / "demo.ptn"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model of one layer, in the place of the bundled one too, a text, and the program that `mq-ao demo` makes."""
    files = Files(tmp_path_factory.mktemp("cli"))
    torch.manual_seed(0)
    save_pretrained(MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)), files.model)
    files.text.write_bytes(TEXT + b"\0" + TEXT[:500])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("FOLDER", files.model), ("HELDOUT", files.text), ("CALIBRATION", files.text)):
            patch.setattr(demo, name, value)
        patch.setattr(demo_command, "ROUNDS", 1)
        patch.setattr(demo_command, "SAMPLE_TOKENS", 5)
        patch.setattr(sys, "argv", ["mq-ao", "demo", "-o", str(files.program)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return files


def test_help_answers_without_torch() -> None:
    program = "import sys; import mq_ao.cli.app; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


BENCHES = ["bench", "bench kernels", "bench profile", "bench quantize", "bench gpu"]


@pytest.mark.parametrize(
    "command", ["quantize", "eval", "compare", "generate", "inspect", *BENCHES, "build-kernels", "gpu-check", "demo"]
)
def test_every_command_has_help_with_an_example(mq_ao: CommandLine, command: str) -> None:
    run = mq_ao(*command.split(), "--help")
    assert run.code == 0
    assert f"mq-ao {command}" in run.out.split("Usage", 1)[1]
    assert "Example" in run.out


def test_version(mq_ao: CommandLine) -> None:
    assert mq_ao("--version").out.startswith("mq-ao 0.")


def test_unknown_options_are_usage_errors(mq_ao: CommandLine) -> None:
    run = mq_ao("eval", "demo", "--no-such-option")
    assert run.code == 2
    assert "--no-such-option" in run.err


def test_demo_saves_a_program_that_others_load(mq_ao: CommandLine, files: Files) -> None:
    run = mq_ao("inspect", files.program)
    assert run.code == 0
    assert "mambaquant-w8a8" in run.out
    assert "linear_packed" in run.out
    assert [path.name for path in files.folder.iterdir() if path.name.startswith(".")] == []


def test_eval_of_the_program_against_its_model(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    target = tmp_path / "eval.json"
    run = mq_ao("eval", files.program, "--text", files.text, "--against", files.model, "--json", target)
    assert run.code == 0, run.err
    assert "bits per byte" in run.out
    content = json.loads(target.read_text())
    model, program = content["models"]
    size = len(TEXT) + 501
    assert model["bytes"] == model["tokens"] == size
    # Random weights hardly prefer any byte: 8 bits, and int8 changes little.
    assert model["bits_per_byte"] == pytest.approx(8, abs=0.5)
    assert program["bits_per_byte"] == pytest.approx(model["bits_per_byte"], rel=0.01)
    assert content["comparison"]["kl_divergence"] < 0.01
    assert program["weight_bytes"] < model["weight_bytes"]


def test_eval_prints_nothing_but_json_to_stdout(mq_ao: CommandLine, files: Files) -> None:
    run = mq_ao("eval", files.model, "--text", files.text, "--window", "100", "--json", "-")
    assert run.code == 0, run.err
    content = json.loads(run.out)
    assert content["comparison"] is None
    assert content["models"][0]["model"] == str(files.model)


def test_eval_of_token_ids(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    numpy.save(tmp_path / "ids.npy", numpy.arange(200))
    run = mq_ao("eval", files.model, "--text", tmp_path / "ids.npy", "--json", "-")
    assert json.loads(run.out)["models"][0]["bits_per_byte"] is None


def test_generate_writes_the_prompt_and_its_continuation(mq_ao: CommandLine, files: Files) -> None:
    drawn = ("--temperature", "1", "--top-k", "5", "--top-p", "0.9", "--seed", "3")
    first = mq_ao("generate", files.program, "--prompt", "def ", "-n", "12", *drawn)
    again = mq_ao("generate", files.program, "--prompt", "def ", "-n", "12", *drawn)
    assert first.code == 0, first.err
    assert first.out.startswith("def ")
    assert len(first.out) > len("def \n")
    assert first.out == again.out
    assert mq_ao("generate", files.model, "--prompt", "é", "-n", "3").out.startswith("é")


def test_inspect_shows_blocks_and_roles(mq_ao: CommandLine, files: Files) -> None:
    run = mq_ao("inspect", files.model)
    assert run.code == 0, run.err
    for wanted in ("1 Mamba block(s)", "backbone.layers.0", "dt_proj", "embedding", "int8 weight, float input"):
        assert wanted in run.out


def test_quantize_with_a_recipe_and_token_ids(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    numpy.save(tmp_path / "ids.npy", numpy.arange(256).reshape(4, 64))
    output = tmp_path / "out.pt2"
    run = mq_ao(
        "quantize", files.model, "--calibration", tmp_path / "ids.npy", "--recipe", "rtn-w8a8-dynamic", "-o", output
    )
    assert run.code == 0, run.err
    assert "linear_packed" in run.out
    assert "nodes quantized" in run.err
    assert "rtn-w8a8-dynamic" in mq_ao("inspect", output).out


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_bench_of_ours_and_installed_peers(mq_ao: CommandLine, files: Files) -> None:
    from mq_ao.bench.prepare import installed_peers

    plan = ("--tokens", "16,4", "--decode-tokens", "2", "--repeats", "1", "--threads", "1", "--json", "-")
    run = mq_ao("bench", "--model", files.model, *plan)
    assert run.code == 0, run.err
    content = json.loads(run.out)
    (model,) = content["models"]
    names = {"transformers": ["transformers eager"], "llama.cpp": ["llama.cpp F32", "llama.cpp Q8_0"]}
    expected = ["fp32 eager", "fp32 compiled", "int8", *(name for peer in installed_peers() for name in names[peer])]
    assert [row["name"] for row in model["contenders"]] == expected
    for row in model["contenders"]:
        assert row["failure"] is None, row
        assert [entry["tokens"] for entry in row["prefill"]] == [4, 16]
        assert row["decode"][0]["ms_per_token"] > 0
        assert row["memory_bytes"]["peak"] > row["memory_bytes"]["weight_bytes"]
        # 8-bit ones on random weights: the order of magnitude; the others are float32.
        assert row["logits_error"] < (0.2 if row["name"] in ("int8", "llama.cpp Q8_0") else 1e-4), row
    assert "int8 against fp32 compiled, prefill of 16 tokens" in model["ratios"]
    assert content["machine"]["threads"] == 1


@pytest.mark.usefixtures("threads")
def test_bench_of_two_recipes(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{name: mine, scheme: {in_proj: {activation: per_token}}}")
    plan = ("--tokens", "4", "--decode-tokens", "2", "--repeats", "1", "--threads", "1", "--peers", "none")
    recipes = ("--recipe", "rtn-w8a8", "--recipe", tmp_path / "mine.yaml")
    run = mq_ao("bench", "--model", files.model, *plan, *recipes, "--json", tmp_path / "bench.json")
    assert run.code == 0, run.err
    content = json.loads((tmp_path / "bench.json").read_text())
    (model,) = content["models"]
    assert content["recipes"] == ["rtn-w8a8", "mine"]
    rows = {row["name"]: row for row in model["contenders"]}
    assert list(rows) == ["fp32 eager", "fp32 compiled", "int8 (rtn-w8a8)", "int8 (mine)"]
    assert all(row["failure"] is None for row in rows.values()), rows
    # Both are what their recipes say: one has int8 weights everywhere, the other in one role.
    weights = [rows[f"int8 ({name})"]["memory_bytes"]["weight_bytes"] for name in ("rtn-w8a8", "mine")]
    assert weights[0] < weights[1] < rows["fp32 compiled"]["memory_bytes"]["weight_bytes"]
    figure = "time of int8 (mine) against int8 (rtn-w8a8), decode"
    assert model["ratios"][figure] > 0 and figure in run.out


@pytest.mark.usefixtures("threads")
def test_bench_of_quantizing(mq_ao: CommandLine, files: Files) -> None:
    recipes = ("--recipe", "rtn-w8a8", "--recipe", "mambaquant-w8a8", "--calibration-tokens", "512")
    run = mq_ao("bench", "quantize", "--model", files.model, *recipes, "--threads", "1", "--json", "-")
    assert run.code == 0, run.err
    rows = json.loads(run.out)["quantizing"]
    assert [(row["recipe"], row["tokens"]) for row in rows] == [("rtn-w8a8", 512), ("mambaquant-w8a8", 512)]
    assert all(row["seconds"] > 0 and row["peak"] > row["libraries"] > row["float_bytes"] for row in rows)


@pytest.mark.usefixtures("threads")
def test_bench_of_kernels(mq_ao: CommandLine, tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    run = mq_ao("bench", "kernels", "--threads", "1", "--json", target)
    assert run.code == 0, run.err
    kernels = json.loads(target.read_text())["kernels"]
    assert list(kernels) == ["selective_scan", "ssd_scan"]
    assert all(name in run.out and all(value > 0 for value in times.values()) for name, times in kernels.items())


def test_build_kernels(mq_ao: CommandLine) -> None:
    run = mq_ao("build-kernels")
    assert run.code == 0, run.err
    assert Path(run.out.strip()).is_file()


def test_build_kernels_for_executorch(mq_ao: CommandLine) -> None:
    pytest.importorskip("executorch.exir", reason='needs executorch: pip install "mq-ao[executorch]"')
    run = mq_ao("build-kernels", "--executorch")
    assert run.code == 0, run.err
    assert Path(run.out.strip()).name == "libmq_ao_executorch.so"


def test_build_kernels_without_executorch(mq_ao: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "ExecuTorch is not installed" in error(mq_ao("build-kernels", "--executorch"))


def test_no_compiler(mq_ao: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler found" in error(mq_ao("build-kernels", "--force"))


def test_bad_models(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    assert "there is no folder" in error(mq_ao("inspect", "./nowhere/at/all"))
    assert "has no config.json" in error(mq_ao("inspect", tmp_path))
    assert "is a saved program" in error(mq_ao("quantize", files.program, "-o", tmp_path / "x.pt2", *calibrate(files)))
    assert "there is no file" in error(mq_ao("inspect", tmp_path / "missing.pt2"))
    (tmp_path / "text.pt2").write_text("no archive")
    assert "not a program saved by mq_ao" in error(mq_ao("generate", tmp_path / "text.pt2", "-p", "x"))


def calibrate(files: Files) -> tuple[str, Path]:
    return "--calibration", files.text


def test_bad_quantize_arguments_stop_before_the_model_is_loaded(
    mq_ao: CommandLine, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MambaLM, "from_pretrained", lambda source: pytest.fail("the model was loaded"))
    output = tmp_path / "out.pt2"
    data = calibrate(files)
    run = mq_ao("quantize", files.model, *data, "-o", tmp_path / "out.bin")
    assert "does not say which program to write: these end in .ptn (native), .pt2 (inductor)" in error(run)
    run = mq_ao("quantize", files.model, *data, "-o", output, "--backend", "native")
    assert "must end in .ptn" in error(run)
    assert "does not exist" in error(mq_ao("quantize", files.model, *data, "-o", tmp_path / "no" / "out.pt2"))
    assert "cannot be written" in error(mq_ao("quantize", files.model, *data, "-o", "/proc/out.pt2"))
    (tmp_path / "folder.pt2").mkdir()
    assert "is a folder" in error(mq_ao("quantize", files.model, *data, "-o", tmp_path / "folder.pt2"))
    run = mq_ao("quantize", files.model, *data, "-o", output, "--recipe", "magic")
    assert "unknown recipe 'magic': the recipes are rtn-w8a8" in error(run)
    run = mq_ao("quantize", files.model, *data, "-o", output, "--backend", "magic")
    assert "unknown backend 'magic'" in error(run)
    assert "needs calibration data" in error(mq_ao("quantize", files.model, "-o", output))
    assert mq_ao("quantize", files.model, "--calibration", tmp_path / "none.txt", "-o", output).code == 2
    assert not output.exists()


def test_bad_calibration(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    output = tmp_path / "out.pt2"
    empty, ids = tmp_path / "empty.txt", tmp_path / "ids.npy"
    empty.touch()
    numpy.save(ids, numpy.arange(300))
    assert "is empty" in error(mq_ao("quantize", files.model, "--calibration", empty, "-o", output))
    assert "outside the model's vocabulary" in error(mq_ao("quantize", files.model, "--calibration", ids, "-o", output))
    assert "--tokens is 0" in error(mq_ao("quantize", files.model, *calibrate(files), "--tokens", "0", "-o", output))
    assert list(tmp_path.glob("*.pt2")) == []


def test_bad_eval_arguments(mq_ao: CommandLine, files: Files, tmp_path: Path) -> None:
    assert "the window is 0" in error(mq_ao("eval", files.model, "--text", files.text, "--window", "0"))
    assert "does not exist" in error(
        mq_ao("eval", files.model, "--text", files.text, "--json", tmp_path / "no" / "eval.json")
    )
    torch.manual_seed(0)
    save_pretrained(MambaLM(MambaConfig(vocab_size=300, d_model=16, n_layer=1)), tmp_path / "words")
    assert "--tokenizer" in error(mq_ao("eval", tmp_path / "words", "--text", files.text))
    assert "--text" in error(mq_ao("eval", tmp_path / "words"))
    assert "--tokenizer" in error(mq_ao("generate", tmp_path / "words", "-p", "x"))
    numpy.save(tmp_path / "ids.npy", numpy.arange(9))
    run = mq_ao("eval", files.model, "--text", tmp_path / "ids.npy", "--against", tmp_path / "words")
    assert "has 256 tokens" in error(run)


def test_bad_generate_arguments(mq_ao: CommandLine, files: Files) -> None:
    assert "the prompt is empty" in error(mq_ao("generate", files.model, "-p", ""))
    assert "temperature is -1" in error(mq_ao("generate", files.model, "-p", "x", "--temperature", "-1"))
    assert "top_p is 2" in error(mq_ao("generate", files.model, "-p", "x", "--top-p", "2"))


def test_bad_bench_arguments(mq_ao: CommandLine, tmp_path: Path) -> None:
    assert "give whole numbers" in error(mq_ao("bench", "--tokens", "many"))
    assert "at least one token" in error(mq_ao("bench", "--tokens", "0,128"))
    assert "unknown peer 'onnx'" in error(mq_ao("bench", "--peers", "onnx"))
    assert "unknown recipe" in error(mq_ao("bench", "--recipe", "magic"))
    assert "unknown recipe" in error(mq_ao("bench", "quantize", "--recipe", "rtn-w8a8", "--recipe", "magic"))
    assert "two recipes are called rtn-w8a8" in error(mq_ao("bench", "--recipe", "rtn-w8a8", "--recipe", "rtn-w8a8"))
    assert "does not exist" in error(mq_ao("bench", "--json", tmp_path / "no" / "bench.json"))
    run = mq_ao("bench", "--tokens", "4", "--decode-tokens", "2", "kernels")
    assert "options before kernels do not count (--tokens, --decode-tokens)" in error(run)


@pytest.mark.parametrize(
    ("command", "option"), [("kernels", "--model"), ("quantize", "--tokens"), ("gpu", "--peers"), ("gpu", "--backend")]
)
def test_each_bench_has_its_own_options(mq_ao: CommandLine, command: str, option: str) -> None:
    run = mq_ao("bench", command, option, "x")
    assert run.code == 2 and f"No such option: {option}" in run.err


def documented() -> Iterator[tuple[str, str]]:
    """Every command that documents, docstrings and comments show, with the file that it stands in."""
    span = re.compile(r"`(mq-ao [a-z][^`]*)`")
    line = re.compile(r"^[#\s]*(?:\$\(BIN\)/)?(mq-ao [a-z].*?)(?: +#.*)?$", re.MULTILINE)
    block = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for name, text in documents(".md", ".py", ".yaml", "Makefile").items():
        if not name.startswith("tests/"):
            unbroken = re.sub(r"\\\n[#\s]*", "", text)
            lines = "\n".join(block.findall(unbroken)) if name.endswith(".md") else unbroken
            yield from ((name, " ".join(item.split())) for item in span.findall(unbroken) + line.findall(lines))


def test_documented_commands_have_the_options_that_are_shown() -> None:
    known, benches = typer.main.get_command(app), 0
    for name, line in documented():
        first, *words = line.split()[1:]
        assert first in known.commands, f"{name}: {line}"
        command = known.commands[first]
        if first == "bench" and words and words[0] in command.commands:
            command, benches = command.commands[words[0]], benches + 1
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words if word.startswith("-")} - {"-"}
        assert given <= options, f"{name}: {line}"
    assert benches >= 10


def test_a_failure_of_the_system_ends_with_1(mq_ao: CommandLine, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str) -> MambaLM:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MambaLM, "from_pretrained", full)
    run = mq_ao("inspect", files.model)
    assert run.code == 1
    assert "No space left on device" in run.err
    assert "Traceback" not in run.err


def test_a_bench_whose_own_program_fails_fails(
    mq_ao: CommandLine, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mq_ao.bench import prepare, runner, worker

    def missing_programs(model: MambaLM, folder: Path, **_: object) -> list[worker.Spec]:
        names = (prepare.FP32, prepare.INT8)
        return [worker.Spec(name, worker.Kind.PROGRAM, folder / "none.pt2", 1, 16) for name in names]

    monkeypatch.setattr(prepare, "prepare", missing_programs)
    monkeypatch.setattr(runner, "PROMPT_TOKENS", 4)
    run = mq_ao("bench", "--model", files.model, "--peers", "none", "--tokens", "4", "--repeats", "1")
    assert run.code == 2
    assert "fp32 compiled: there is no file" in run.err


def test_generate_writes_no_tokens_that_the_tokenizer_does_not_know(mq_ao: CommandLine, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=16, d_model=16, n_layer=1, d_state=4, tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[4:] *= 100  # what the vocabulary was padded with is the likeliest
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path)
    run = mq_ao("generate", tmp_path, "--prompt", "a b", "-n", "30", "--temperature", "1")
    assert run.code == 0, run.err
    assert run.out.startswith("a b") and run.out.endswith("\n")
    assert len(run.out.removeprefix("a b").split()) == 30  # ids that it does not know have no text


def test_generate_stops_at_the_end_of_the_text(mq_ao: CommandLine, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=4, d_model=16, n_layer=1, d_state=4, tie_embeddings=False))
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(tmp_path)
    run = mq_ao("generate", tmp_path, "--prompt", "a b", "-n", "200", "--temperature", "2")
    assert run.code == 0, run.err
    assert "<e>" not in run.out
    assert 2 <= len(run.out.split()) < 100
