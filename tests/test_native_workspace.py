"""Memory of what a native program computes on its way: used again within a run, and never while somebody holds it."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import mq_ao
from mq_ao.lowering import native
from mq_ao.lowering.native.plan import Plan, Step, Value
from mq_ao.models import MambaLM
from tests.conftest import tokens

pytestmark = pytest.mark.usefixtures("native_kernels")

LENGTH = 4096
"""Tokens, so that a block's values are megabytes."""


@pytest.fixture(scope="module")
def program(tiny: MambaLM, calibration: list[Tensor]) -> native.NativeProgram:
    return mq_ao.quantize(tiny, calibration, "mambaquant-w8a8").lower()


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_values_of_later_steps_lie_where_those_of_earlier_ones_lay() -> None:
    links = 8
    steps = tuple(Step("mq_ao::hadamard.default", (Value(link),), (link + 1,)) for link in range(links))
    chain = Plan(1, steps, (links,)).bound([])
    x = torch.randn(20_000, 512)  # 41 MB: more than malloc ever keeps
    chain.run([x])
    before = page_faults()
    (y,) = chain.run([x])
    # Two values are alive at a time, and a page has 4 kB. Every value anew would be eight times as many.
    assert page_faults() - before < 3 * x.nbytes / 4096
    assert torch.allclose(y, x, atol=1e-4)  # a rotation and its inverse, four times


def test_what_is_given_out_stays_as_it_is(program: native.NativeProgram) -> None:
    ids, others = tokens(1, LENGTH), tokens(1, LENGTH, seed=1)
    logits, *states = program(ids)
    kept = [value.clone() for value in (logits, *states)]
    program(others)
    assert all(map(torch.equal, (logits, *states), kept))
    logits.resize_(2 * logits.numel())  # as any tensor
    assert torch.equal(logits[: kept[0].numel()], kept[0].flatten())


def test_threads_have_workspaces_of_their_own(program: native.NativeProgram) -> None:
    ids = [tokens(1, LENGTH, seed=seed) for seed in range(4)]
    alone = [program(each)[0] for each in ids]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: program(each)[0], ids))
    assert all(map(torch.equal, alone, together))
