"""Several threads and processes at once."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

import mq_ao
from mq_ao.models import MambaLM
from tests.blocks import Blocks, X, output
from tests.conftest import tokens

BATCHES = [tokens(2, 12, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return Blocks()


def test_threads_take_turns(tiny: MambaLM, blocks: Blocks) -> None:
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        try:
            model, batches = ((tiny, BATCHES), (blocks, X))[index % 2]
            results[index] = mq_ao.quantize(model, batches, "mambaquant-w8a8")
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = output(mq_ao.quantize(blocks, X, "mambaquant-w8a8"), X[0])
    assert torch.equal(output(results[1], X[0]), expected)
    assert torch.equal(output(results[3], X[0]), expected)
    inputs = (BATCHES[0], *tiny.initial_states(2))
    assert torch.equal(output(results[0], *inputs), output(results[2], *inputs))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork(blocks: Blocks) -> None:
    mq_ao.quantize(blocks, X, "rtn-w8a8")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            mq_ao.quantize(blocks, X, "rtn-w8a8")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
