"""The C++ example for ExecuTorch: builds it, and compares what it writes with what Python generates."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.executorch import Options
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.ops.native.shared_library import ARCH_FLAG, compiler

EXAMPLE = Path(__file__).parents[1] / "examples" / "executorch_runner"
TOKENS = 24
PIECE = 8
"""Longest prefill of the tests' program: most prompts go in pieces."""


@pytest.fixture(scope="session")
def wheel() -> Path:
    """Folder of the executorch package."""
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("executorch is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def runner(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built as its README says: a machine without tools skips, a build that fails fails."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    try:
        cxx = compiler()
    except MqAoError as error:
        pytest.skip(str(error))
    build = tmp_path_factory.mktemp("executorch_runner")
    # For this machine's vector extensions, as Python builds its kernels.
    options = [f"-Dexecutorch_DIR={wheel / 'share' / 'cmake'}", f"-DCMAKE_CXX_COMPILER={cxx}"]
    for command in (
        ["cmake", "-S", str(EXAMPLE), "-B", str(build), f"-DMQ_AO_ARCH={ARCH_FLAG}", *options],
        ["cmake", "--build", str(build), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.fail(f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return build / "runner"


def lowered(folder: Path, vocab_size: int, batch: int = 1) -> Path:
    """A program of a random model with one layer."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=vocab_size, d_model=32, n_layer=1)).eval()
    calibration = [torch.randint(0, vocab_size, (2, 32)) for _ in range(4)]
    q = mq_ao.quantize(model, calibration=calibration, recipe="mambaquant-w8a8", backend="executorch")
    path = folder / f"tiny-{vocab_size}-{batch}.pte"
    q.lower(options=Options(batch=batch, max_length=PIECE)).save(path)
    return path


@pytest.fixture(scope="session")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level program."""
    return lowered(tmp_path_factory.mktemp("program"), 256)


def run(runner: Path, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([runner, *arguments], capture_output=True, timeout=120, check=False)


def written(runner: Path, program: Path, *arguments: str) -> bytes:
    """What the runner writes to stdout."""
    done = run(runner, program, "--tokens", str(TOKENS), *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def assert_refused(done: subprocess.CompletedProcess[bytes], message: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that has `message`."""
    assert done.returncode == 2
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("runner: ") and message in line


# With the token before it: one piece, a whole one, one and a single token, two whole ones and more.
@pytest.mark.parametrize("prompt", ["x", "é—", "import ", "class A:", "return self.value"])
def test_the_text_is_what_python_generates(runner: Path, program: Path, prompt: str) -> None:
    ids = torch.tensor([[0, *prompt.encode()]])
    made = mq_ao.load(program).generate(ids, max_new_tokens=TOKENS)[0, ids.shape[1] :]
    assert written(runner, program, "--prompt", prompt) == bytes(made.tolist()) + b"\n"


def test_prompts_do_not_see_one_another(runner: Path, program: Path) -> None:
    first, second = (written(runner, program, "--prompt", prompt) for prompt in ("def ", "class A"))
    assert first != second
    both = written(runner, program, "--prompt", "def ", "--prompt", "class A", "--prompt", "def ")
    assert both == first + second + first


def test_a_draw_depends_on_its_seed_alone(runner: Path, program: Path) -> None:
    draws = [
        written(runner, program, "--prompt", "def ", "--temperature", "2", "--seed", seed) for seed in ("1", "1", "2")
    ]
    assert draws[0] == draws[1] != draws[2]


def test_the_speed_of_both_methods_is_told(runner: Path, program: Path) -> None:
    lines = run(runner, program, "--prompt", "def ", "--tokens", "3").stderr.decode().splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["prefill: 5 tokens", "decode: 2 tokens"]
    assert all(line.endswith(" tokens/s") for line in lines)


def test_files_that_are_no_programs_of_ours_are_refused(runner: Path, wheel: Path, tmp_path: Path) -> None:
    from executorch.exir import to_edge

    missing, garbage, other = (tmp_path / name for name in ("missing.pte", "garbage.pte", "other.pte"))
    assert_refused(run(runner, missing, "--prompt", "a"), "there is no file")
    garbage.write_bytes(bytes(range(256)) * 64)
    assert_refused(run(runner, garbage, "--prompt", "a"), "is not an ExecuTorch program")
    exported = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    other.write_bytes(to_edge(exported).to_executorch().buffer)
    assert_refused(run(runner, other, "--prompt", "a"), "is not a program of mq-ao: it has no method")


def test_a_damaged_program_is_refused(runner: Path, program: Path, tmp_path: Path) -> None:
    content = bytearray(program.read_bytes())
    cut, damaged = tmp_path / "cut.pte", tmp_path / "damaged.pte"
    cut.write_bytes(content[: len(content) // 2])
    assert_refused(run(runner, cut, "--prompt", "a"), "is not an ExecuTorch program")
    content[100:4000] = b"\xff" * 3900
    damaged.write_bytes(content)
    assert_refused(run(runner, damaged, "--prompt", "a"), "is not an ExecuTorch program")


def test_a_program_for_a_batch_is_refused(runner: Path, wheel: Path, tmp_path: Path) -> None:
    assert_refused(run(runner, lowered(tmp_path, 256, batch=2), "--prompt", "a"), "is a program for batch 2")


def test_tokens_outside_the_vocabulary_are_refused(runner: Path, wheel: Path, tmp_path: Path) -> None:
    small, large = lowered(tmp_path, 64), lowered(tmp_path, 300)
    assert_refused(run(runner, small, "--prompt", "2a"), "has a byte 97, outside the model's vocabulary of 64")
    assert_refused(run(runner, large, "--prompt", "2a"), "has a vocabulary of 300 tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a program"),
        (["m.pte"], "give a text to continue"),
        (["m.pte", "--prompt", ""], "the prompt is empty"),
        (["m.pte", "n.pte", "--prompt", "a"], "one MODEL.pte is run"),
        (["m.pte", "--prompt"], "--prompt needs a value"),
        (["m.pte", "--promt", "a"], "there is no option --promt"),
        (["m.pte", "--prompt", "a", "--tokens", "0"], "--tokens is 0"),
        (["m.pte", "--prompt", "a", "--seed", "-1"], "--seed is -1"),
        (["m.pte", "--prompt", "a", "--temperature", "hot"], "--temperature is hot"),
    ],
)
def test_bad_arguments_are_refused(runner: Path, arguments: list[str], message: str) -> None:
    assert_refused(run(runner, *arguments), message)


def test_help_is_on_stdout(runner: Path) -> None:
    done = run(runner, "--help")
    assert done.returncode == 0 and done.stdout.startswith(b"usage: runner MODEL.pte") and done.stderr == b""
