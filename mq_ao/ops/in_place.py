"""Variants of every operator that carries a state, which write it where it belongs.

They are for decoding, where states are most of what moves besides weights.

`mq_ao::<name>_` overwrites `initial_state` by the last state and gives y; on the CPU it runs the operator and copies.
`mq_ao::<name>_into` takes the tensor that becomes the last state as its last argument, and gives y.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The operators have to be there first.
from mq_ao.ops import (  # noqa: F401
    causal_conv1d,
    library,
    qcausal_conv1d,
    qselective_scan,
    qssd_scan,
    selective_scan,
    ssd_scan,
)
from mq_ao.ops.library import require

STATEFUL = ("causal_conv1d", "qcausal_conv1d", "selective_scan", "qselective_scan", "ssd_scan", "qssd_scan")
"""The operators `(..., initial_state, ...) -> (y, last_state)` that have such variants."""
_DEFAULT = re.compile(r"=[^,)]+")


def state_index(name: str) -> int:
    """Which argument of an operator is its `initial_state`."""
    schema = getattr(torch.ops.mq_ao, name).default._schema
    return [argument.name for argument in schema.arguments].index("initial_state")


def check_state(what: str, state: Tensor, last_state: Tensor) -> None:
    """Raises MqAoError unless the last state can be copied into `state`, an argument called `what`, as it is."""
    require(
        state.dtype == last_state.dtype,
        f"{what} must be {last_state.dtype}, as the last state is, not {state.dtype}.",
    )
    require(
        state.dim() == last_state.dim(),
        f"{what} must have {last_state.dim()} dimensions, as the last state has, not {state.dim()}.",
    )


def _define(name: str) -> None:
    """Both variants of an operator."""
    operator, index = getattr(torch.ops.mq_ao, name).default, state_index(name)
    arguments = str(operator._schema).partition("(")[2].rpartition(") -> ")[0]
    arguments = _DEFAULT.sub("", arguments)
    in_place = arguments.replace("Tensor? initial_state", "Tensor(a!) initial_state")
    _variant(f"{name}_", "initial_state", in_place, operator, lambda args: (args, args[index]))
    into = f"{arguments}, Tensor(a!) last_state"
    _variant(f"{name}_into", "last_state", into, operator, lambda args: (args[:-1], args[-1]))


def _variant(
    name: str,
    written: str,
    arguments: str,
    operator: Any,
    given: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], Tensor]],
) -> None:
    """The variant that writes its argument `written`; `given` returns the operator's own arguments, and that tensor."""

    def results(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        called, memory = given(args)
        y, last_state = operator(*called)
        check_state(f"{name}: {written}", memory, last_state)
        return y, last_state, memory

    def fake(*args: Any) -> Tensor:
        return results(args)[0]

    def reference(*args: Any) -> Tensor:
        y, last_state, memory = results(args)
        memory.copy_(last_state)
        return y

    library.define(name, f"({arguments}) -> Tensor", fake=fake, reference=reference)


for _name in STATEFUL:
    _define(_name)
