"""Every Triton kernel and configuration compiles for GPUs that are not here, without spills and within their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CommandLine, error


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_everything_compiles_and_nothing_spills(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # In a process of its own, as here Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    target = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-c",
        "from mq_ao.cli import main; main()",
        "build-kernels",
        "--gpu",
        architecture,
        "--json",
        target,
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(target.read_text())
    from mq_ao.ops.triton import IMPLEMENTATIONS

    assert {row["operator"] for row in rows} == set(IMPLEMENTATIONS)
    assert all(row["spilled"] == 0 and row["registers"] <= 255 for row in rows)
    assert "not run" in run.stdout


def test_bad_requests_are_refused(mq_ao: CommandLine) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert "unknown architecture 'sm_75'" in error(mq_ao("build-kernels", "--gpu", "sm_75"))
    assert "--json is for the rows of --gpu" in error(mq_ao("build-kernels", "--json", "-"))
