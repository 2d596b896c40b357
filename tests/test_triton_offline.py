"""Every Triton kernel and configuration compiles for GPUs that are not here, without spills and within their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CommandLine, error


def test_everything_compiles_and_nothing_spills(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # In a process of its own, as here Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    target = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "mq_ao",
        "build-kernels",
        "--gpu",
        "sm_80,sm_90,sm_100",
        "--json",
        target,
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(target.read_text())
    from mq_ao.ops.in_place import STATEFUL
    from mq_ao.ops.triton import IMPLEMENTATIONS

    # The operators that overwrite a state run the kernels of those that do not.
    operators = set(IMPLEMENTATIONS) - {f"{name}_" for name in STATEFUL}
    chips = [(operator, chip) for operator in operators for chip in (80, 90, 100)]
    assert {(row["operator"], row["architecture"]) for row in rows} == set(chips)
    assert all(row["spilled"] == 0 and row["registers"] <= 255 for row in rows)
    assert "not run" in run.stdout


def test_bad_requests_are_refused(mq_ao: CommandLine) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert "unknown architecture 'sm_75'" in error(mq_ao("build-kernels", "--gpu", "sm_75"))
    assert "--json is for the rows of --gpu" in error(mq_ao("build-kernels", "--json", "-"))


def test_registered_they_are_the_operators_cuda_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # In a process of its own, since it cannot be undone.
    code = """
import torch
from mq_ao.ops import gpu, triton
assert gpu.load_triton()
for name in triton.IMPLEMENTATIONS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mq_ao::{name}", "CUDA"), name
q = torch.ones(2, 32, dtype=torch.int8)
assert torch.ops.mq_ao.linear_rows(q, None, q, torch.ones(2)).tolist() == [[32.0, 32.0]] * 2
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_without_interpreter_or_gpu_a_kernel_says_what_it_needs() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import torch
from mq_ao import MqAoError
from mq_ao.ops.triton import linear_rows
q = torch.ones(2, 32, dtype=torch.int8)
try:
    linear_rows.run(q, None, q, torch.ones(2))
except MqAoError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "runs on CUDA tensors, or with TRITON_INTERPRET=1" in run.stdout, run.stderr
