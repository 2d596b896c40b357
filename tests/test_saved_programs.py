"""A saved program in threads, processes and workers, and files that were damaged on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.cuda import CudaProgram
from mq_ao.models import MambaLM
from mq_ao.quantized import QuantizedModel
from tests.conftest import assert_same_bits_for_any_threads, tokens

IDS = tokens(2, 7, seed=11)


@pytest.fixture(scope="module")
def saved(tiny: MambaLM, calibration: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny.pt2"
    mq_ao.quantize(tiny, calibration, "mambaquant-w8a8").lower("inductor").save(path)
    return path


@pytest.fixture(scope="module")
def expected(saved: Path) -> Tensor:
    return logits(saved)


def logits(path: Path) -> Tensor:
    return mq_ao.load(path)(IDS)[0]


def write_logits(path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.save(logits(path), out)


class Scored(Dataset[Tensor]):
    """Runs the program where an item is fetched, which is in a worker."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return logits(self.path)[index]


def test_any_number_of_threads_gives_the_same_bits(saved: Path) -> None:
    program = mq_ao.load(saved)
    assert_same_bits_for_any_threads(lambda: program(IDS)[:3])


def test_python_threads_share_a_program(saved: Path, expected: Tensor) -> None:
    program = mq_ao.load(saved)
    results: list[Any] = [None] * 6

    def work(index: int) -> None:
        results[index] = [program(IDS)[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(item, expected) for result in results for item in result)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(saved: Path, expected: Tensor, tmp_path: Path, method: str) -> None:
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    process = torch.multiprocessing.get_context(method).Process(target=write_logits, args=(saved, tmp_path / "out"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert torch.equal(torch.load(tmp_path / "out", weights_only=True), expected)


def test_workers_of_a_loader(saved: Path, expected: Tensor) -> None:
    (batch,) = DataLoader(Scored(saved), batch_size=2, num_workers=2 if hasattr(os, "fork") else 0)
    assert torch.equal(batch, expected)


@pytest.fixture(scope="module")
def files(
    saved: Path, quantized_for_cuda: QuantizedModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    path = tmp_path_factory.mktemp("files") / "tiny.ptc"
    quantized_for_cuda.lower().save(path)
    return {
        ".pt2": (saved.read_bytes(), mq_ao.load),
        ".ptc": (path.read_bytes(), partial(CudaProgram.load, device="cpu")),
    }


@pytest.fixture(scope="module")
def quantized_for_cuda(tiny: MambaLM, calibration: list[Tensor]) -> QuantizedModel:
    return mq_ao.quantize(tiny, calibration, "rtn-w8a8", backend="cuda")


@pytest.mark.parametrize("suffix", [".pt2", ".ptc"])
def test_cut_and_flipped_files_are_named(files: Any, suffix: str, tmp_path: Path) -> None:
    content, load = files[suffix]
    path = tmp_path / f"damaged{suffix}"
    for part in (0.0, 0.01, 0.5, 0.999):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(MqAoError, match=f"damaged{suffix} is (not a program saved by mq_ao|damaged)"):
            load(path)
    for part in (0.2, 0.5, 0.8):
        flipped = bytearray(content)
        flipped[int(len(content) * part)] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(MqAoError, match=f"damaged{suffix} is (not a program saved by mq_ao|damaged)"):
            load(path)
