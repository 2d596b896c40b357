"""A profile runs what the program runs, and counts the bytes and operations that the model's shapes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.native import file, stepwise
from mq_ao.lowering.native.program import NativeProgram
from mq_ao.models import Mamba2Config, MambaLM, Vim, VimConfig, language_model
from mq_ao.roofline.machine import Peaks, measure
from mq_ao.roofline.measured import Line, lines
from tests.conftest import VOCAB, CommandLine, error, tokens

pytestmark = pytest.mark.usefixtures("native_kernels")

PEAKS = Peaks(bandwidth=1e9, int8=4e9, fp32=1e9)


def saved(model: Any, batches: list[Any], recipe: str, path: Path) -> Path:
    mq_ao.quantize(model, batches, recipe).lower().save(path)
    return path


@pytest.fixture(scope="module")
def path(tiny: MambaLM, calibration: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny, calibration, "mambaquant-w8a8", tmp_path_factory.mktemp("profile") / "tiny.ptn")


def test_step_by_step_it_gives_the_same_bits(path: Path) -> None:
    whole, run = mq_ao.load(path), stepwise.Stepwise(file.read(path))
    timed = NativeProgram(file.read(path), run)
    ids = tokens(2, 19)
    expected, got = whole.prefill(ids), timed.prefill(ids)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    first = run.take_calls()
    again = timed.decode(ids[:, :1], *got[1:])
    assert all(torch.equal(a, b) for a, b in zip(again, whole.decode(ids[:, :1], *expected[1:]), strict=True))
    timed.decode(ids[:, :1], *got[1:])
    calls = run.take_calls()
    assert [call.operator for call in calls] == [call.operator for call in first]
    assert {len(call.seconds) for call in first} == {1} and {len(call.seconds) for call in calls} == {2}
    assert run.take_calls() == []
    kernels = [call for call in calls if call.operator == "mq_ao.linear_packed"]
    assert len(kernels) == whole.integer_kernels["mq_ao.linear_packed.default"]


def profiled(path: Path, length: int) -> dict[str, list[Line]]:
    return {phase.name: lines(phase, PEAKS) for phase in stepwise.profile(path, length, runs=2)}


def total(found: list[Line], *operators: str) -> dict[str, int]:
    chosen = [line.cost for line in found if line.operator in operators]
    return {"int8": sum(cost.int8 for cost in chosen), "moved": sum(cost.moved for cost in chosen)}


LINEARS = ("mq_ao.linear_packed", "mq_ao.linear_packed_per_token")


def test_operations_are_those_of_the_shapes(path: Path, tiny: MambaLM) -> None:
    config, length = tiny.config, 21
    d, inner, rank, n = config.d_model, config.d_inner, config.rank, config.d_state
    block = d * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d
    found = profiled(path, length)
    # The head sees the last token alone.
    assert total(found["prefill"], *LINEARS)["int8"] == 2 * (length * config.n_layer * block + d * VOCAB)
    assert total(found["decode"], *LINEARS)["int8"] == 2 * (config.n_layer * block + d * VOCAB)
    (scan,) = [line for line in found["prefill"] if line.operator == "mq_ao.qselective_scan_into"]
    assert scan.calls == config.n_layer and scan.shape == f"1 x {length} x {inner}"
    assert scan.cost.special == config.n_layer * length * inner * (n + 2)


def test_bytes_are_moved_once(path: Path, tiny: MambaLM) -> None:
    weights = sum(t.nbytes for t in file.read(path).weights.values())
    embedding = tiny.config.d_model * VOCAB
    decoded = profiled(path, 4)["decode"]
    moved = sum(line.cost.moved for line in decoded)
    # All weights but the rows of the embedding of other tokens, and what flows between.
    assert weights - embedding <= moved < 2 * weights
    assert all(line.cost.moved == 0 for line in decoded if line.operator in ("aten.select", "aten.split_with_sizes"))


def test_four_bits_and_mamba2(tmp_path: Path, calibration: list[Tensor]) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=VOCAB, d_model=64, n_layer=2, d_state=16, headdim=16)
    model = language_model(config).eval()
    found = profiled(saved(model, calibration, "rtn-w4a16", tmp_path / "w4a16.ptn"), 12)
    inner = config.d_inner
    in_proj = 64 * (2 * inner + 2 * 16 + inner // 16)
    products = sum(line.cost.int8 for line in found["decode"] if line.operator.startswith("mq_ao.linear_packed"))
    assert products == 2 * (2 * (in_proj + inner * 64) + 64 * VOCAB)
    found = profiled(saved(model, calibration, "rtn-w8a8", tmp_path / "w8a8.ptn"), 12)
    (scan,) = [line for line in found["prefill"] if line.operator == "mq_ao.ssd_scan_into"]
    assert scan.cost.fp32 == 2 * 5 * 12 * inner * 16


def test_shares_are_of_the_peaks() -> None:
    from mq_ao.roofline.cost import Cost

    line = Line("mq_ao.linear_packed", "4 -> 8", 2, 0.5, Cost(moved=int(2e8), int8=int(1e9), fp32=int(1e8)), PEAKS)
    assert line.memory_share == pytest.approx(0.4)
    assert line.compute_share == pytest.approx((0.25 + 0.1) / 0.5)


def test_peaks_are_measured() -> None:
    peaks = measure()
    # From a slow board to a server.
    assert 1e8 < peaks.bandwidth < 1e13
    assert 1e8 < peaks.fp32 < 1e14 and 1e8 < peaks.int8 < 1e15


def test_as_a_table_as_json_and_as_a_plot(path: Path, mq_ao: CommandLine, tmp_path: Path) -> None:
    plot, target = tmp_path / "roofline.svg", tmp_path / "profile.json"
    given = ("--tokens", 16, "--runs", 2, "--threads", torch.get_num_threads(), "--plot", plot, "--json", target)
    run = mq_ao("bench", "profile", path, *given)
    assert run.code == 0, run.err
    for wanted in (
        "prefill of 16 token(s)",
        "decode of 1 token(s)",
        "mq_ao.qselective_scan_into",
        "Peaks of this machine",
    ):
        assert wanted in run.out, wanted
    content = json.loads(target.read_text())
    assert content["decode"]["ms"] > 0 and content["peaks"]["bandwidth"] > 0
    scans = [row for row in content["prefill"]["operators"] if row["operator"] == "mq_ao.qselective_scan_into"]
    assert [row["calls"] for row in scans] == [2]
    assert "qselective_scan" in plot.read_text()


def test_what_cannot_be_profiled_is_refused(path: Path, mq_ao: CommandLine, tmp_path: Path) -> None:
    assert "takes a .ptn program, and x.pt2 is none" in error(mq_ao("bench", "profile", "x.pt2"))
    assert "mq-ao inspect x.pte --profile" in error(mq_ao("bench", "profile", "x.pte"))
    assert "there is no file" in error(mq_ao("bench", "profile", tmp_path / "none.ptn"))
    assert "must end in .png or .svg" in error(mq_ao("bench", "profile", path, "--plot", tmp_path / "r.pdf"))
    torch.manual_seed(0)
    config = VimConfig(image_size=8, patch_size=4, in_channels=1, num_classes=3, d_model=16, n_layer=1, d_state=4)
    vision = saved(Vim(config).eval(), [(torch.randn(4, 1, 8, 8),)], "rtn-w8a8", tmp_path / "vim.ptn")
    with pytest.raises(MqAoError, match="is a program of no language model"):
        stepwise.profile(vision, 8, 1)
