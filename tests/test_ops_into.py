"""`mq_ao::<name>_into`: the same results as the operator's, the last state in the caller's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mq_ao.ops.in_place import STATEFUL, state_index

pytestmark = pytest.mark.usefixtures("native_kernels")
mq = torch.ops.mq_ao
BATCH, CHANNELS, STATES, HEADS = 2, 24, 16, 3


def operands(name: str, length: int, seed: int = 0) -> list[Any]:
    """Of an operator, in the order of its schema, with an initial state."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    def q(*shape: int) -> list[Any]:
        return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen), 0.02, 117]

    rows, decay = (BATCH, length, CHANNELS), -torch.rand(CHANNELS, STATES, generator=gen) - 0.1
    taps, matrix = torch.randint(-127, 128, (CHANNELS, 4), dtype=torch.int8, generator=gen), (BATCH, length, 1, STATES)
    heads, head_decay = (BATCH, length, HEADS, 8), -torch.rand(HEADS, generator=gen) - 0.1
    flat = (BATCH, length, STATES)
    state = draw(BATCH, CHANNELS, STATES)
    return {
        "causal_conv1d": [draw(*rows), draw(CHANNELS, 4), None, draw(BATCH, 3, CHANNELS), "silu"],
        "qcausal_conv1d": [*q(*rows), taps, draw(CHANNELS).abs(), None, draw(BATCH, 3, CHANNELS), None, 0.05, 3],
        "selective_scan": [draw(*rows), draw(*rows), decay, draw(*flat), draw(*flat), None, None, True, state],
        "qselective_scan": [
            *(*q(*rows), *q(*rows), decay, *q(*flat), *q(*flat)),
            *(draw(CHANNELS), None, True, state, None, None, 0),
        ],
        "ssd_scan": [
            *(draw(*heads), draw(*heads[:3]), head_decay, draw(*matrix), draw(*matrix), None, None, True, 0.0, None),
            *(draw(BATCH, HEADS, 8, STATES), None),
        ],
        "qssd_scan": [
            *(*q(*heads), *q(*heads[:3]), head_decay, *q(*matrix), *q(*matrix), None, None, True, 0.0, None),
            *(draw(BATCH, HEADS, 8, STATES), None, None, 0),
        ],
    }[name]


def bound(name: str, length: int) -> tuple[list[Any], Tensor, Tensor]:
    args = operands(name, length)
    y, last = getattr(mq, name)(*args)
    return args, y, last


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("name", STATEFUL)
def test_the_results_are_the_operators(name: str, length: int) -> None:
    args, y, last = bound(name, length)
    stacked = torch.full((3, *last.shape), float("nan"), dtype=last.dtype)
    memory = stacked[1]
    before = args[state_index(name)].clone()
    assert torch.equal(getattr(mq, f"{name}_into")(*args, memory), y)
    assert torch.equal(memory, last) and torch.equal(args[state_index(name)], before)
    assert stacked[0].isnan().all() and stacked[2].isnan().all()
    # Where the kernel cannot write: a copy.
    strided = torch.zeros(*last.shape, 2, dtype=last.dtype)[..., 0]
    assert torch.equal(getattr(mq, f"{name}_into")(*args, strided), y) and torch.equal(strided, last)
    # The next call has memory of its own.
    other = getattr(mq, name)(*args)[1]
    assert other.data_ptr() != memory.data_ptr() and torch.equal(other, last)


@pytest.mark.parametrize("name", [name for name in STATEFUL if name != "qcausal_conv1d"])  # takes no float64
def test_what_the_reference_computes_goes_there_too(name: str) -> None:
    args, *_ = bound(name, 3)
    args = [arg.double() if isinstance(arg, Tensor) and arg.dtype == torch.float32 else arg for arg in args]
    y, last = getattr(mq, name)(*args)
    memory = torch.zeros_like(last)
    assert torch.equal(getattr(mq, f"{name}_into")(*args, memory), y) and torch.equal(memory, last)


@pytest.mark.parametrize("name", STATEFUL)
def test_memory_of_another_type_or_size_is_refused(name: str) -> None:
    args, _, last = bound(name, 3)
    for wrong in (last.double(), last[..., :-1].contiguous()):
        before = wrong.clone()
        with pytest.raises(RuntimeError, match=f"{name}_into: last_state must be"):
            getattr(mq, f"{name}_into")(*args, wrong)
        assert torch.equal(wrong, before)
