"""What a `.pte` file consists of, why operators are outside delegates, and the time of each."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import mq_ao
from mq_ao.errors import MqAoError
from mq_ao.lowering.executorch import Options, anatomy
from mq_ao.lowering.executorch.program import open_program
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.ops.native import executorch_build
from tests.conftest import CommandLine

pytest.importorskip("executorch", reason='needs pip install "mq-ao[executorch]"')


@pytest.fixture
def inspect(mq_ao: CommandLine) -> CommandLine:
    """Runs `mq-ao inspect` in this process."""
    return lambda *args: mq_ao("inspect", *args)


@pytest.fixture(scope="module")
def pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model of one layer."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)).eval()
    ids = torch.randint(0, 256, (2, 32))
    quantized = mq_ao.quantize(model, [ids], "mambaquant-w8a8", backend="executorch")
    path = tmp_path_factory.mktemp("inspect") / "tiny.pte"
    quantized.lower(options=Options(max_length=64)).save(path)
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of one linear, made by executorch alone."""
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(torch.nn.Linear(4, 4), (torch.zeros(1, 4),))
    path = tmp_path_factory.mktemp("foreign") / "linear.pte"
    path.write_bytes(to_edge_transform_and_lower(exported).to_executorch().buffer)
    return path


def test_every_operator_outside_has_a_reason(pte: Path) -> None:
    _, info = open_program(pte)
    for method in info["methods"].values():
        assert set(method["reasons"]) >= set(method["outside"])
    reasons = info["methods"]["prefill"]["reasons"]
    assert reasons["mq_ao::qselective_scan"] == "a native operator of mq_ao"
    assert reasons["embedding"] == "XNNPACK has no such operator"
    # The embedding's int8 rows become float: XNNPACK's own words.
    assert reasons["dim_order_ops::_to_dim_order_copy"] == "invalid dtype"


def test_listening_to_refusals_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    from executorch.exir.backend.utils import WhyNoPartition

    from mq_ao.lowering.executorch.delegates import refusals

    parent = logging.getLogger("executorch.backends.xnnpack.partition.config")
    before = (parent.level, parent.propagate, list(parent.handlers))
    child = logging.getLogger(f"{parent.name}.gemm_configs")
    graph = torch.fx.Graph()
    first, second = graph.placeholder("first"), graph.placeholder("second")
    why = WhyNoPartition(child)
    with refusals() as found:
        why(first, "it is too large.")
        why(second, "it is too small")
        child.warning("seen as ever")
    assert found == {"first": "it is too large", "second": "it is too small"}
    assert [record.message for record in caplog.records] == ["seen as ever"]
    assert (parent.level, parent.propagate, list(parent.handlers)) == before


def test_parts_add_up_to_the_file(pte: Path) -> None:
    parts = anatomy.read(pte)
    named = (parts.weight_bytes, parts.graph_bytes, parts.constant_bytes, parts.other_bytes)
    assert sum(named) == parts.file_bytes == pte.stat().st_size
    assert min(named) > 0
    # Linears of this model: in, x, dt, out and the head; int8 is what delegates read most of, scales are the rest.
    linears = 32 * 128 + 64 * (2 + 32) + 2 * 64 + 64 * 32 + 32 * 256
    assert linears < parts.weight_bytes < 1.5 * linears


def test_methods_and_their_memory(pte: Path) -> None:
    methods = anatomy.read(pte).methods
    _, info = open_program(pte)
    assert set(methods) == {"prefill", "decode", "reset"}
    for name, method in methods.items():
        described = info["methods"][name]
        assert method.delegates == described["delegates"]
        # The rest is added later, to write the states.
        assert {key: method.operators[key] for key in described["outside"]} == described["outside"]
    # float32 states of one sequence: 3 columns of 64 channels, and 64 x 16.
    (state_bytes,) = {method.state_bytes for method in methods.values()}
    assert state_bytes == 4 * (3 * 64 + 64 * 16)
    assert methods["prefill"].activation_bytes > methods["decode"].activation_bytes > 0


def test_inspect_without_the_native_library(inspect: CommandLine, pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch_build, "load", lambda: pytest.fail("the library is not needed"))
    run = inspect(pte)
    assert run.code == 0, run.err
    for wanted in (
        "mambaquant-w8a8",
        "conv_state 1 x 3 x 64, ssm_state 1 x 64 x 16",
        "mq_ao::qselective_scan",
        "4 int8 weight, static int8 input",
        "XNNPACK has no such operator",
        "weights and scales that delegates read",
        str(pte.stat().st_size),
    ):
        assert wanted in run.out
    assert "integer_linears" not in run.out


def test_profile(inspect: CommandLine, pte: Path) -> None:
    from mq_ao.lowering.executorch.profile import RUNS, profile

    prefill, decode = profile(pte, tokens=9)
    assert (prefill.name, prefill.tokens, decode.name, decode.tokens) == ("prefill", 9, "decode", 1)
    plans = anatomy.read(pte).methods
    for method in (prefill, decode):
        runs, plan = RUNS[method.name], plans[method.name]
        assert len(method.runs) == runs
        backend = method.operators["XnnpackBackend"]
        assert len(backend.calls) == plan.delegates * runs
        others = {name: len(timing.calls) for name, timing in method.operators.items() if timing is not backend}
        assert others == {name: count * runs for name, count in plan.operators.items()}
        assert any("Fully Connected" in name for name in backend.inside)
        assert 0 <= method.rest < method.total
    run = inspect(pte, "--profile")
    assert run.code == 0, run.err
    for wanted in ("prefill of 64 tokens", "decode of 1 token", "XnnpackBackend", "Fully Connected", "qselective_scan"):
        assert wanted in run.out


def test_profile_counts_every_pass_of_a_loop(tmp_path: Path) -> None:
    from mq_ao.lowering.executorch.profile import RUNS, profile

    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)).eval()
    options = Options(max_length=16, scan=mq_ao.lowering.executorch.Scan.PORTABLE)
    ids = torch.randint(0, 256, (2, 32))
    path = tmp_path / "portable.pte"
    mq_ao.quantize(model, [ids], "rtn-w8a8", backend="executorch").lower(options=options).save(path)
    prefill, _ = profile(path)
    assert prefill.tokens == 16
    assert len(prefill.operators["exp"].calls) == 16 * RUNS["prefill"]
    _, info = open_program(path)
    assert "in the body of a scan" in info["methods"]["prefill"]["reasons"]["exp"]


def test_bad_input_is_one_sentence(inspect: CommandLine, pte: Path, foreign: Path, tmp_path: Path) -> None:
    for args, wanted in (
        ((foreign,), "is not a program that mq_ao made"),
        ((foreign, "--profile"), "is not a program that mq_ao made"),
        ((tmp_path / "none.pte",), "there is no file"),
        (("demo.pt2", "--profile"), "--profile is for .pte programs"),
        ((pte, "--tokens", "3"), "give both"),
        ((pte, "--profile", "--tokens", "65"), "takes 64 tokens at most"),
    ):
        run = inspect(*args)
        assert (run.code, run.out) == (2, "")
        assert wanted in run.err.splitlines()[-1]
        assert "Traceback" not in run.err


def test_profile_tells_of_a_runtime_without_events(pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mq_ao.lowering.executorch import profile

    monkeypatch.setattr(profile, "open_program", lambda path, **_: open_program(path))
    with pytest.raises(MqAoError, match="records no events"):
        profile.profile(pte, tokens=4)
