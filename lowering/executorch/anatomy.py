"""What a `.pte` file consists of, read without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ACTIVATIONS, _STATES = 1, 2
"""Where memory planning puts what lives during a call, and what lives between calls."""


@dataclass(frozen=True)
class MethodPlan:
    """What one method does, in order.

    Attributes:
        name: of the method.
        instructions: by chain and number: the operator that is called without its overload, the delegate's backend,
            or None for a move or jump.
        delegates: number of delegate calls.
        operators: calls of operators by name; one in the body of a loop counts once.
        activation_bytes: planned memory of what lives during a call.
        state_bytes: planned memory of the states, which all methods share.
    """

    name: str
    instructions: tuple[tuple[str | None, ...], ...]
    delegates: int
    operators: Mapping[str, int]
    activation_bytes: int
    state_bytes: int

    @property
    def count(self) -> int:
        """Number of instructions."""
        return sum(map(len, self.instructions))


@dataclass(frozen=True)
class Anatomy:
    """A `.pte` file.

    Attributes:
        methods: those that do something, by name; not the ones that give a constant.
        file_bytes: size of the file, which the parts add up to.
        weight_bytes: what delegates read by name: each tensor once, whatever number of delegates reads it.
        graph_bytes: graphs of the delegates.
        constant_bytes: constants of operators outside delegates.
    """

    methods: Mapping[str, MethodPlan]
    file_bytes: int
    weight_bytes: int
    graph_bytes: int
    constant_bytes: int

    @property
    def other_bytes(self) -> int:
        """Instructions, descriptions of tensors, what the program says of itself, and padding."""
        return self.file_bytes - self.weight_bytes - self.graph_bytes - self.constant_bytes


def read(path: Path) -> Anatomy:
    """Takes a file apart.

    Args:
        path: a program that `open_program` accepts.
    """
    from mq_ao.compat.executorch import deserialize_pte_binary

    content = path.read_bytes()
    file = deserialize_pte_binary(content)
    plans = [plan for plan in file.program.execution_plan if any(chain.instructions for chain in plan.chains)]
    weights = [] if file.named_data is None else file.named_data.buffers
    return Anatomy(
        methods={plan.name: _plan(plan) for plan in plans},
        file_bytes=len(content),
        weight_bytes=sum(map(len, weights)),
        graph_bytes=sum(len(item.data) for item in file.program.backend_delegate_data),
        constant_bytes=sum(len(item.storage) for item in file.program.constant_buffer),
    )


def _plan(plan: Any) -> MethodPlan:
    instructions = tuple(tuple(_what(plan, item.instr_args) for item in chain.instructions) for chain in plan.chains)
    ids = [delegate.id for delegate in plan.delegates]
    flat = [name for chain in instructions for name in chain if name is not None]
    sizes = [*plan.non_const_buffer_sizes, 0, 0]
    return MethodPlan(
        name=plan.name,
        instructions=instructions,
        delegates=sum(name in ids for name in flat),
        operators=Counter(name for name in flat if name not in ids),
        activation_bytes=sizes[_ACTIVATIONS],
        state_bytes=sizes[_STATES],
    )


def _what(plan: Any, call: Any) -> str | None:
    from executorch.exir.schema import DelegateCall, KernelCall

    if isinstance(call, KernelCall):
        return plan.operators[call.op_index].name.removeprefix("aten::")
    if isinstance(call, DelegateCall):
        return plan.delegates[call.delegate_index].id
    return None
