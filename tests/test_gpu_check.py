"""`mq-ao gpu-check`: the budget, what goes on after a failure, a hang or a crash, resuming, and bad input."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from mq_ao import MqAoError
from mq_ao.gpu_check import devices, plan
from mq_ao.gpu_check.checks import CheckFailed, Skipped
from mq_ao.gpu_check.drawn import DRAWN, drawn
from mq_ao.gpu_check.plan import FAILED, Stage
from mq_ao.gpu_check.results import Results, Verdict
from mq_ao.gpu_check.runner import OVER, Budget, run
from mq_ao.gpu_check.settings import REAL, REHEARSED, Setting
from mq_ao.gpu_check.stages import kernels
from mq_ao.ops.triton import IMPLEMENTATIONS
from tests.conftest import CommandLine, error

HEAD = {"rehearsal": True, "versions": {"torch": "9.9"}, "device": "cpu"}
SETTING = Setting("cpu", replace(REHEARSED, lengths=(1,)))


def stage(kinds: str, name: str = "a", expected: float = 1.0, part_limit: float = 60.0, **options: str) -> Stage:
    given = {"kinds": kinds, **options}
    return Stage(name, "of tests", "tests.gpu_check_stages", expected, 90.0, given, part_limit)


def ran(path: Path, *stages: Stage, seconds: float = 300.0, again: tuple[str, ...] = ()) -> Results:
    results = Results(path, HEAD)
    run(stages, SETTING, results, Budget(seconds), again)
    return results


@pytest.fixture(scope="module", autouse=True)
def _started(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process that all stages are forked from has imported PyTorch, which takes longer than tests of time wait."""
    ran(tmp_path_factory.mktemp("started") / "found.json", stage("fine"))


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_every_part_has_its_verdict_and_the_next_ones_go_on(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    results = ran(path, stage("fine wrong raises dies skips also"), stage("missing", "b"), stage("fine", "c"))
    parts = written(path)["stages"]["a"]["parts"]
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "fine": "passed",
        "wrong": "failed",
        "raises": "failed",
        "dies": "failed",
        "skips": "skipped",
        "also": "passed",
    }
    assert parts["fine"]["result"] == {"value": 1} and parts["wrong"]["result"] == {"off": 3.0}
    assert parts["wrong"]["reason"] == "it is off by 3" and parts["wrong"]["trace"] == []
    assert parts["raises"]["reason"] == "RuntimeError: device-side assert"
    assert "_raises" in "\n".join(parts["raises"]["trace"])
    assert "code -11" in parts["dies"]["reason"]
    assert "Segmentation fault" in "\n".join(parts["dies"]["trace"])
    assert "No module named 'torchao'" in written(path)["stages"]["b"]["parts"]["start"]["reason"]
    assert [results.stages[name].verdict for name in "abc"] == ["failed", "failed", "passed"]


def test_a_part_that_hangs_is_ended_and_says_where(tmp_path: Path) -> None:
    started = time.monotonic()
    results = ran(tmp_path / "found.json", stage("fine hangs also", part_limit=6.0))
    parts = results.stages["a"].parts
    assert [part.verdict for part in parts.values()] == ["passed", "failed", "passed"]
    assert "hangs was ended after" in str(parts["hangs"].reason)
    assert "_hangs" in "\n".join(parts["hangs"].trace)
    assert time.monotonic() - started < 60


def test_what_does_not_fit_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    results = ran(path, stage("fine", "long", expected=400.0), stage("fine", "short"))
    assert results.stages["long"].verdict == "not run" and results.stages["short"].verdict == "passed"
    assert "it is thought to take 400 s, and 300 s were left" in written(path)["stages"]["long"]["reason"]
    # With more time, that alone is run.
    longer = ran(path, stage("fine", "long", expected=400.0), stage("fine", "short"), seconds=500.0)
    assert longer.stages["long"].verdict == "passed" and longer.stages["long"].reason is None


def test_a_stage_out_of_time_keeps_what_it_has(tmp_path: Path) -> None:
    found = ran(tmp_path / "found.json", stage("fine hangs also"), seconds=6.0).stages["a"]
    assert found.parts["fine"].verdict == "passed" and not found.finished and found.reason == OVER
    assert found.parts["hangs"].verdict == found.parts["also"].verdict == "not run"
    assert found.verdict == Verdict.NOT_RUN


def test_a_second_run_goes_on_and_asked_for_runs_again(tmp_path: Path) -> None:
    path, count = tmp_path / "found.json", tmp_path / "count"

    def runs(again: tuple[str, ...] = ()) -> list[str]:
        count.write_text("")
        ran(path, stage("fine wrong", count=str(count)), again=again)
        return count.read_text().split()

    assert runs() == ["fine", "wrong"]
    assert runs() == []
    assert runs((FAILED,)) == ["wrong"]
    assert runs(("a",)) == ["fine", "wrong"]
    assert written(path)["remark"].startswith("A rehearsal on the CPU, kernels interpreted: no time in here is a GPU's")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    ran(path, stage("fine"))
    with pytest.raises(MqAoError, match="holds results for versions"):
        Results(path, {**HEAD, "versions": {"torch": "9.10"}})
    for text in ("{}", "no JSON", "[]"):
        path.write_text(text)
        with pytest.raises(MqAoError, match="was not written by mq-ao gpu-check"):
            Results(path, HEAD)


def test_every_kernel_has_arguments_that_its_reference_takes() -> None:
    assert DRAWN.keys() == IMPLEMENTATIONS.keys()
    for name in DRAWN:
        for seed, length in enumerate(REHEARSED.lengths):
            getattr(torch.ops.mq_ao, f"{name}_reference")(*drawn(name, seed, REHEARSED.widths, length))


@pytest.mark.parametrize("name", ["linear_rows", "int8_scan_step_", "qcausal_conv1d_"])
def test_a_kernel_passes_and_one_that_is_off_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices._Rehearsing, "now", True)  # this process keeps its kernels
    assert kernels.parts(SETTING)[name]()["shapes"][0]["results"]
    plain = kernels._results

    def off(given: Any, args: Any, operator: str) -> list[torch.Tensor]:
        off.calls += 1
        return [result + off.calls % 2 for result in plain(given, args, operator)]

    off.calls = 0
    monkeypatch.setattr(kernels, "_results", off)
    with pytest.raises(CheckFailed, match=f"{name} is off: shape 0, result 0"):
        kernels.parts(SETTING)[name]()


def test_numbers_that_are_none_are_off() -> None:
    x = torch.ones(4)
    assert kernels._compared(x, x, "gate")["passes"]
    assert not kernels._compared(x.where(x > 1, torch.nan), x, "gate")["passes"]
    assert not kernels._compared(x.half(), x, "gate")["passes"]


def test_a_shape_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**9, 3 * 10**9))
    setting = Setting("cuda", REAL)
    devices.check_room(setting, "a model", 1e9)
    with pytest.raises(Skipped, match=r"a model needs about 5\.0 GB, and 2\.0 GB of the device are free"):
        devices.check_room(setting, "a model", 5e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert devices.chip(setting).title.startswith("H100")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(Skipped, match="the roofline knows no tesla t4"):
        devices.chip(setting)


def test_the_command_rehearses_and_says_so(mq_ao: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ("gpu-check", "--device", "cpu", "-o", path, "--stage", "machine", "--minutes", "9")
    first = mq_ao(*arguments)
    assert first.code == 0, first.err
    assert "A rehearsal on the CPU, kernels interpreted" in first.out and "passed" in first.out
    assert written(path)["rehearsal"] is True and "remark" in written(path)
    assert "kept, it has run before" in mq_ao(*arguments).err or written(path)["stages"]["machine"]["seconds"] > 0


def test_a_failure_ends_with_1(mq_ao: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "STAGES", (stage("fine wrong"),))
    done = mq_ao("gpu-check", "--device", "cpu", "-o", tmp_path / "found.json", "--minutes", "9")
    assert done.code == 1 and "wrong: it is off by 3" in done.out


def test_bad_input_is_refused_at_once(mq_ao: CommandLine, tmp_path: Path) -> None:
    assert "unknown device 'tpu'" in error(mq_ao("gpu-check", "--device", "tpu"))
    assert "--stage 'bench': there is no such stage" in error(mq_ao("gpu-check", "--device", "cpu", "--stage", "bench"))
    assert "they are machine, kernels" in error(mq_ao("gpu-check", "--device", "cpu", "--again", "x"))
    assert "there is no folder" in error(mq_ao("gpu-check", "--prepared", tmp_path / "none"))
    assert "is a folder" in error(mq_ao("gpu-check", "--device", "cpu", "-o", tmp_path))
    if not torch.cuda.is_available():
        assert "PyTorch sees 0 GPUs here" in error(mq_ao("gpu-check", "-o", tmp_path / "found.json"))
