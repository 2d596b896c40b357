"""`mq_ao::<name>_` of every operator that carries a state: it overwrites `initial_state` by the last, and gives y.

They are for decoding, where states are most of what moves besides weights. On the CPU they run the operator and copy.
"""

from __future__ import annotations

import re
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
"""The operators `(..., initial_state, ...) -> (y, last_state)` that have such a twin."""
_DEFAULT = re.compile(r"=[^,)]+")


def state_index(name: str) -> int:
    """Which argument of an operator is its `initial_state`."""
    schema = getattr(torch.ops.mq_ao, name).default._schema
    return [argument.name for argument in schema.arguments].index("initial_state")


def check_state(name: str, state: Tensor, last_state: Tensor) -> None:
    """Raises MqAoError unless one can be copied into the other as it is."""
    require(
        state.dtype == last_state.dtype,
        f"{name}_: initial_state must be {last_state.dtype}, as the last state is, not {state.dtype}.",
    )


def _define(name: str) -> None:
    operator, index = getattr(torch.ops.mq_ao, name).default, state_index(name)

    def results(*args: Any) -> tuple[Tensor, Tensor]:
        y, last_state = operator(*args)
        check_state(name, args[index], last_state)
        return y, last_state

    def fake(*args: Any) -> Tensor:
        y, _ = results(*args)
        return y

    def reference(*args: Any) -> Tensor:
        y, last_state = results(*args)
        args[index].copy_(last_state)
        return y

    arguments = str(operator._schema).partition("(")[2].rpartition(" -> ")[0]
    arguments = _DEFAULT.sub("", arguments).replace("Tensor? initial_state", "Tensor(a!) initial_state")
    library.define(f"{name}_", f"({arguments} -> Tensor", fake=fake, reference=reference)


for _name in STATEFUL:
    _define(_name)
