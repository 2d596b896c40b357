"""Tiny models and programs that several test files share."""

from __future__ import annotations

import importlib
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported: kernels then run on CPU tensors, one operation after the other.
    os.environ["TRITON_INTERPRET"] = "1"

import mq_ao as package
from mq_ao import MqAoError
from mq_ao.cli import main
from mq_ao.lowering.inductor import InductorProgram
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.ops import library
from mq_ao.ops.native import build
from mq_ao.quantized import QuantizedModel

VOCAB = 256
TIERS: dict[str, dict[str, list[str]]] = tomllib.loads((Path(__file__).parent / "tiers.toml").read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what smaller test runs leave out."""
    slow, slowest = (set(TIERS[tier]["files"]) for tier in ("slow", "slowest"))
    functions = set(TIERS["slowest"]["functions"])
    for item in items:
        file, name = item.path.name, item.nodeid.partition("[")[0].rpartition("/")[2]
        if file in slow:
            item.add_marker(pytest.mark.slow)
        if file in slowest or name in functions:
            item.add_marker(pytest.mark.slowest)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of the tiny model."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", autouse=True)
def plain_transformers() -> None:
    """transformers' models take mamba_ssm's functions, which need a GPU, if it can be imported when they are."""
    for name in (
        "mamba",
        "mamba2",
        "falcon_mamba",
        "bamba",
        "falcon_h1",
        "granitemoehybrid",
        "jamba",
        "zamba",
        "zamba2",
    ):
        with suppress(ImportError):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.fixture(scope="session")
def native_kernels() -> None:
    """The native kernels are what is tested: a machine without a compiler skips, a build that fails fails."""
    if not library.load_native():
        try:
            build.compiler()
        except MqAoError as error:
            pytest.skip(str(error))
        pytest.fail(f"the native kernels do not build: {library.NativeState.failure}")


def assert_same_bits_for_any_threads(call: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Checks that the results of `call` have the same bits on 1, 2 and 3 threads."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def assert_same_for_any_threads(operator: Callable[..., Any], operands: Sequence[Any]) -> None:
    """Checks both results and all gradients of an operator likewise."""
    tensors = [x.requires_grad_() for x in operands if isinstance(x, torch.Tensor)]

    def call() -> list[torch.Tensor]:
        y, state = operator(*operands)
        return [y, state, *torch.autograd.grad([y.sum() + state.sum()], tensors)]

    assert_same_bits_for_any_threads(call)


@pytest.fixture(scope="session")
def tiny() -> MambaLM:
    """A random two-layer model, in eval mode; tests must not change it."""
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=64, n_layer=2)).eval()


@pytest.fixture(scope="session")
def calibration() -> list[torch.Tensor]:
    """Token ids that no test evaluates on."""
    return [tokens(2, 32, seed=seed) for seed in range(100, 104)]


@pytest.fixture(scope="session", params=["rtn-w8a8", "rtn-w8a8-dynamic"])
def quantized(request: pytest.FixtureRequest, tiny: MambaLM, calibration: list[torch.Tensor]) -> QuantizedModel:
    """The tiny model quantized by each recipe."""
    return package.quantize(tiny, calibration, request.param)


@pytest.fixture(scope="session")
def program(quantized: QuantizedModel) -> InductorProgram:
    """The quantized tiny model, compiled."""
    return quantized.lower("inductor")


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


CommandLine = Callable[..., Run]


@pytest.fixture
def mq_ao(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs the entry point in this process."""

    def run(*args: str | Path) -> Run:
        monkeypatch.setattr(sys, "argv", ["mq-ao", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        code = stop.value.code
        return Run(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def error(run: Run) -> str:
    """The message of a run that failed on bad input: nothing on stdout, one line on stderr."""
    assert run.code == 2, run
    assert run.out == ""
    lines = run.err.splitlines()
    assert lines[-1].startswith("error: "), run.err
    assert "Traceback" not in run.err
    return lines[-1]


def _on_the_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on CUDA copies of its tensors; what it gives, and what it changes, comes back to the CPU."""

    def moved(value: Any, device: str) -> Any:
        if isinstance(value, torch.Tensor):
            # With the same strides: some operands are slices.
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            return copy.copy_(value)
        return tuple(moved(item, device) for item in value) if isinstance(value, tuple) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        copies, named = moved(args, "cuda"), {name: moved(value, "cuda") for name, value in kwargs.items()}
        results = moved(function(*copies, **named), "cpu")
        for value, copy in zip((*args, *kwargs.values()), (*copies, *named.values()), strict=True):
            if isinstance(value, torch.Tensor) and not torch.equal(value, copy.cpu()):
                value.copy_(copy)
        return results

    return call


@pytest.fixture(autouse=True)
def triton_kernels_run_where_they_can(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked `gpu` call Triton kernels with CPU tensors: on a GPU, if there is one, and else interpreted."""
    if request.node.get_closest_marker("gpu") is None:
        return
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        from mq_ao.ops import triton

        for module in {sys.modules[item.run.__module__] for item in triton.IMPLEMENTATIONS.values()}:
            for name in [name for name in vars(module) if name.startswith("run")]:
                monkeypatch.setattr(module, name, _on_the_gpu(getattr(module, name)))
