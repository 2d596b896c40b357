"""The GPU's bench, rehearsed on the CPU: all of it but the GPU's own kernels."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mq_ao.bench import gpu, peer_mamba_ssm
from mq_ao.cli.bench_gpu import bench_gpu
from mq_ao.lowering.cuda import Mode
from mq_ao.models import MAMBA2_130M, MAMBA_130M, MambaLM
from mq_ao.models.saving import save_pretrained
from mq_ao.recipes import get_recipe
from tests.conftest import CommandLine, error

PLAN = gpu.Plan((5, 9), decode_tokens=3, repeats=2, dtype=torch.bfloat16, mode=Mode.EAGER)


def test_contenders_are_checked_and_timed(tiny: MambaLM) -> None:
    recipes = [get_recipe("rtn-w8a8"), get_recipe("mambaquant-w4a16")]
    rows, left_out = gpu.run(tiny, recipes, PLAN, torch.device("cpu"), lambda _: nullcontext())
    names = ["bfloat16 eager", "bfloat16 compiled", "int8 (rtn-w8a8)", "int8 (mambaquant-w4a16)"]
    assert [row.name for row in rows] == names
    for row in rows:
        assert set(row.prefill_ms) == {5, 9} and min(*row.prefill_ms.values(), row.decode_ms) > 0
        assert row.memory_bytes is None
    assert rows[3].weight_bytes < rows[2].weight_bytes < rows[0].weight_bytes
    assert [row.error for row in rows] == [None, None, 0.0, 0.0]
    assert left_out and "mamba_ssm's kernels" in left_out[0]
    assert next(tiny.parameters()).dtype == torch.float32


def test_the_table_and_the_file(tiny: MambaLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(tiny, tmp_path / "tiny")
    source, target = str(tmp_path / "tiny"), tmp_path / "gpu.json"
    bench_gpu([source], [get_recipe("rtn-w8a8")], PLAN, "cpu", {"cpu": "some"}, str(target))
    shown = capsys.readouterr().out
    assert "bfloat16 eager" in shown and "(1.00x)" in shown and "left out: mamba_ssm" in shown
    written = json.loads(target.read_text())
    assert written["device"] == "cpu" and len(written["models"][0]["rows"]) == 3


def test_without_a_gpu_it_says_so(mq_ao: CommandLine) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "CUDA was asked for, but PyTorch sees no GPU" in error(mq_ao("bench", "gpu"))


@pytest.mark.parametrize("device", ["tpu", "cpu"])
def test_other_devices_are_refused(mq_ao: CommandLine, device: str) -> None:
    assert f"unknown device '{device}': it is cuda" in error(mq_ao("bench", "gpu", "--device", device))


def test_the_peer_says_what_it_lacks() -> None:
    assert peer_mamba_ssm.missing(MAMBA2_130M) == "set up for Mamba-1 alone"
    reason = peer_mamba_ssm.missing(MAMBA_130M)
    assert reason is None or "cannot be imported" in reason
