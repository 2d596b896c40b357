"""An operator is its typed function: called, it dispatches; its reference does not; kernels take operands by name."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from mq_ao import MqAoError
from mq_ao.compat.operators import TorchDispatchMode
from mq_ao.ops import linear_packed, linear_packed_weight_only, packing
from mq_ao.ops.gate import gate
from mq_ao.ops.hadamard import hadamard
from mq_ao.ops.in_place import STATEFUL
from mq_ao.ops.operator import Operands, Operator, by_reference, implements
from mq_ao.ops.qgate import qgate, qgate_per_token
from tests.test_cuda_steps import operands

ROWS, BYTES = torch.linspace(-1, 1, 24).view(3, 8), torch.arange(24, dtype=torch.uint8).view(3, 8)
WEIGHT, SCALE = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
PACKED = packing.linear_prepack.reference(WEIGHT)
CALLS: list[tuple[Operator[..., Any], list[Any]]] = [
    *((getattr(import_module(f"mq_ao.ops.{name}"), name), operands(name)) for name in STATEFUL),
    (packing.linear_prepack, [WEIGHT]),
    (packing.linear_unpack, [PACKED, 4, 8]),
    (linear_packed.linear_packed, [BYTES, 0.1, 3, PACKED, SCALE]),
    (linear_packed.quantize_per_token, [ROWS]),
    (linear_packed.linear_packed_per_token, [BYTES, ROWS[:, :1].contiguous(), PACKED, SCALE]),
    (linear_packed_weight_only.linear_packed_weight_only, [ROWS, PACKED, SCALE]),
    (hadamard, [ROWS]),
    (gate, [ROWS, ROWS]),
    (qgate, [ROWS, 1.0, 0, ROWS, 1.0, 0, None, True, 0.1, 3]),
    (qgate_per_token, [ROWS, 1.0, 0, ROWS, 1.0, 0, None, True]),
]


class Seen(TorchDispatchMode):
    """Keeps the operators of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mq_ao":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("operator", "args"), CALLS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_function_calls_the_operator_and_its_reference_does_not(operator: Any, args: list[Any]) -> None:
    with Seen() as seen:
        operator(*args)
    assert seen.names == [f"mq_ao.{operator.__name__}.default"]
    with Seen() as seen:
        operator.reference(*args)
    assert not seen.names


def test_operands_have_names_and_defaults() -> None:
    a = gate.operands(ROWS, z=BYTES)
    assert (a.y is ROWS, a.z is BYTES, a.s, a.hadamard) == (True, True, None, False)
    assert (a.but(s=1, t=2).s, a.but(s=1, t=2).t, a.s) == (1, 2, None)
    with pytest.raises(AttributeError, match="no operand x"):
        assert a.x
    assert inspect.signature(gate) == inspect.signature(gate.reference)


def test_a_kernel_takes_an_operators_arguments_and_more_of_its_own() -> None:
    @implements(gate, into=None)
    def kernel(a: Operands) -> Tensor:
        return by_reference(gate, a) if a.into is None else a.into

    assert torch.equal(kernel(ROWS, z=ROWS), gate.reference(ROWS, ROWS))
    assert kernel(ROWS, ROWS, into=BYTES) is BYTES


def test_results_are_checked_before_the_reference_runs() -> None:
    for call in (gate, gate.reference, lambda y, z: gate.results(gate.operands(y, z))):
        with pytest.raises(MqAoError, match="gate: z must be float32"):
            call(ROWS, BYTES)
