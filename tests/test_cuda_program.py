"""Programs for CUDA on the CPU: everything but the GPU's own kernels is what a GPU would run."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import compile_float
from mq_ao.lowering.cuda import CudaProgram
from mq_ao.models import MambaLM
from mq_ao.models.states import tensors
from mq_ao.quantized import QuantizedModel
from tests.conftest import CommandLine, error, tokens


@pytest.fixture(scope="module")
def gpu(tiny: MambaLM, calibration: list[Tensor]) -> QuantizedModel:
    return mq_ao.quantize(tiny, calibration, "mambaquant-w8a8", backend="cuda")


@pytest.fixture(scope="module")
def lowered(gpu: QuantizedModel) -> CudaProgram:
    program = gpu.lower()
    assert isinstance(program, CudaProgram)
    return program


def test_prefill_and_decode_compute_what_the_simulation_does(
    gpu: QuantizedModel, lowered: CudaProgram, tiny: MambaLM
) -> None:
    for batch, length in ((1, 1), (3, 33), (2, 7)):
        ids = tokens(batch, length + 1)
        with torch.no_grad():
            expected, *_ = gpu.converted(ids, *tiny.initial_states(batch))
        every, *_ = lowered(ids)
        last, conv, ssm = lowered.prefill(ids[:, :length])
        following, *_ = lowered.decode(ids[:, length:], conv, ssm)
        for got, wanted in (
            (every, expected),
            (last, expected[:, length - 1 : length]),
            (following, expected[:, length:]),
        ):
            assert got.shape == wanted.shape
            # A rounding error may carry an activation over the border between two integers: see test_recipes.
            assert (got - wanted).norm() / wanted.norm() < 2e-2


def test_a_saved_program_is_the_same(lowered: CudaProgram, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.ptc"
    lowered.save(path)
    loaded = mq_ao.load(path)
    ids = tokens(2, 9)
    assert isinstance(loaded, CudaProgram) and loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.equal(loaded.generate(ids, 5), lowered.generate(ids, 5))
    assert loaded.integer_kernels == lowered.integer_kernels
    assert loaded.info["recipe"] == "mambaquant-w8a8"
    assert loaded.weight_bytes == lowered.weight_bytes
    with zipfile.ZipFile(path) as archive:
        # Everything is stored once.
        assert sum(item.file_size for item in archive.infolist() if "/data/weights" in item.filename) < (
            1.2 * lowered.weight_bytes + 20_000
        )


@pytest.mark.parametrize("recipe", ["mambaquant-w8a8", "rtn-w8a8-dynamic", None])
def test_on_another_device_everything_is_there(
    recipe: str | None, tiny: MambaLM, calibration: list[Tensor], tmp_path: Path
) -> None:
    quantized = None if recipe is None else mq_ao.quantize(tiny, calibration, recipe, backend="cuda")
    made = compile_float(tiny, "cuda") if quantized is None else quantized.lower()
    made.save(tmp_path / "m.ptc")
    for program in (made, CudaProgram.load(tmp_path / "m.ptc", "cpu")):
        assert isinstance(program, CudaProgram)
        elsewhere = program.on("meta", "eager")
        ids, states = torch.zeros(2, 19, dtype=torch.int64), tensors(elsewhere.states.zeros(2))
        for positions, length in ((torch.arange(19), 19), (torch.zeros(1, dtype=torch.int64), 1)):
            args = [value.to("meta") for value in (ids[:, :length], *states, positions)]
            # Shape functions alone run there, and a tensor of the CPU among theirs is an error.
            results = elsewhere.run("prefill", *args)
            assert {result.device.type for result in results} == {"meta"}
        # What it was made from is as before.
        assert {value.device.type for value in program._module.state_dict().values()} == {"cpu"}
        assert program.prefill(tokens(1, 5))[0].device.type == "cpu"


def test_compiled_it_generates_the_same(lowered: CudaProgram, tmp_path: Path) -> None:
    lowered.save(tmp_path / "m.ptc")
    compiled = CudaProgram.load(tmp_path / "m.ptc", "cpu", "default")
    ids = tokens(2, 9)
    expected, got = lowered.prefill(ids), compiled.prefill(ids)
    assert (got[0] - expected[0]).norm() / expected[0].norm() < 2e-2
    step = ids[:, :1]
    expected, got = lowered.decode(step, *expected[1:]), compiled.decode(step, *expected[1:])
    assert (got[0] - expected[0]).norm() / expected[0].norm() < 2e-2


def test_the_float_graph_becomes_a_program_too(tiny: MambaLM) -> None:
    program = compile_float(tiny, "cuda")
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = tiny(ids)[0]
    torch.testing.assert_close(program(ids)[0], expected, rtol=1e-4, atol=1e-5)
    assert program.integer_kernels == {}


def test_an_int8_carried_state_stays_in_int8(tiny: MambaLM, calibration: list[Tensor]) -> None:
    recipe = mq_ao.recipes.get_recipe("mambaquant-w8a8")
    scheme = recipe.scheme.replaced(carried_state=mq_ao.quantizer.RoleSpec())
    quantized = mq_ao.quantize(tiny, calibration, mq_ao.recipes.Recipe("mine", scheme, recipe.passes), backend="cuda")
    program = quantized.lower()
    _, conv, ssm = program.prefill(tokens(2, 9))
    assert ssm.dtype == torch.int8
    assert program.decode(tokens(2, 1), conv, ssm)[2].dtype == torch.int8


def test_what_cannot_run_here_is_refused(lowered: CudaProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.ptc"
    lowered.save(path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MqAoError, match="CUDA was asked for, but PyTorch sees no GPU"):
        CudaProgram.load(path, "cuda")
    with pytest.raises(MqAoError, match="unknown mode 'fast': the modes are eager, default, reduce-overhead"):
        CudaProgram.load(path, "cpu", "fast")
    with pytest.raises(MqAoError, match=r"must end in \.ptc"):
        lowered.save(tmp_path / "m.pt2")
    other = tmp_path / "other.ptc"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("extra/mq_ao.json"):
                content = json.dumps({**json.loads(content), "torch": "1.0"}).encode()
            new.writestr(item, content)
    with pytest.raises(MqAoError, match=r"was saved for torch 1\.0, but this is"):
        mq_ao.load(other)


def test_the_command_says_that_it_was_not_run_on_a_gpu(
    mq_ao: CommandLine, tiny: MambaLM, calibration: list[Tensor], tmp_path: Path
) -> None:
    from mq_ao.models.saving import save_pretrained

    save_pretrained(tiny, tmp_path / "tiny")
    import numpy as np

    np.save(tmp_path / "ids.npy", torch.cat([batch.flatten() for batch in calibration]).numpy())
    run = mq_ao(
        "quantize",
        tmp_path / "tiny",
        "--calibration",
        tmp_path / "ids.npy",
        "--backend",
        "cuda",
        "-o",
        tmp_path / "t.ptc",
    )
    assert run.code == 0, run.err
    assert "not run on a GPU" in run.out and "linear_rows" in run.out
    shown = mq_ao("inspect", tmp_path / "t.ptc")
    assert shown.code == 0 and "int8_gate" in shown.out
    assert "must end in .ptc" in error(mq_ao("quantize", tmp_path / "tiny", "--backend", "cuda", "-o", "t.pt2"))
