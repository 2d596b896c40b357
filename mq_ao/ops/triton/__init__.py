"""Triton kernels: what the operators run on CUDA tensors.

One file an operator or a pair of them. Each has a function with the operator's arguments that checks them, makes the
outputs and launches a kernel; and `examples()`, arguments on the device "meta" for which the kernel is compiled when
there is no GPU. This package is imported at the first call of an operator on a GPU, since Triton is not everywhere.

None of this was run on a GPU: it was interpreted, and compiled offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.library import Library

from mq_ao.ops.in_place import STATEFUL, check_state, state_index
from mq_ao.ops.triton import (
    causal_conv1d,
    int8_gate,
    int8_rms_norm,
    int8_steps,
    linear_rows,
    linear_rows_weight_only,
    selective_scan,
    ssd_scan,
)
from mq_ao.ops.triton.launch import Launch, written_down


@dataclass(frozen=True)
class Implementation:
    """What an operator runs on CUDA tensors.

    Attributes:
        run: takes the operator's arguments.
        examples: arguments, on the device "meta", that stand for all ways in which kernels are compiled.
    """

    run: Callable[..., Any]
    examples: Callable[[], Iterable[tuple[Any, ...]]]

    def launches(self) -> list[Launch]:
        """The launches that the examples lead to."""
        with written_down() as launches:
            for args in self.examples():
                self.run(*args)
        return launches


_OWN: Mapping[str, Implementation] = {
    "causal_conv1d": Implementation(causal_conv1d.run, causal_conv1d.examples),
    "gate": Implementation(int8_gate.run_gate, int8_gate.gate_examples),
    "hadamard": Implementation(int8_gate.run_hadamard, int8_gate.hadamard_examples),
    "int8_conv_step_": Implementation(int8_steps.run_conv, int8_steps.conv_examples),
    "int8_gate": Implementation(int8_gate.run, int8_gate.examples),
    "linear_rows": Implementation(linear_rows.run, linear_rows.examples),
    "linears_rows": Implementation(linear_rows.run_pieces, linear_rows.pieces_examples),
    "int8_rms_norm": Implementation(int8_rms_norm.run, int8_rms_norm.examples),
    "int8_scan_step_": Implementation(int8_steps.run_scan, int8_steps.scan_examples),
    "qcausal_conv1d": Implementation(causal_conv1d.run_quantized, causal_conv1d.quantized_examples),
    "linear_rows_weight_only": Implementation(linear_rows_weight_only.run, linear_rows_weight_only.examples),
    "selective_scan": Implementation(selective_scan.run, selective_scan.examples),
    "qselective_scan": Implementation(selective_scan.run_quantized, selective_scan.quantized_examples),
    "ssd_scan": Implementation(ssd_scan.run, ssd_scan.examples),
    "qssd_scan": Implementation(ssd_scan.run_quantized, ssd_scan.quantized_examples),
}


def _in_place(name: str) -> Implementation:
    """Of an operator's twin that overwrites the state: the same kernels, for which the operator has examples."""
    run, index = _OWN[name].run, state_index(name)

    def run_in_place(*args: Any) -> Any:
        state = args[index]
        y, last_state = run(*args, into=state)
        if last_state is not state:
            check_state(f"{name}_: initial_state", state, last_state)
            state.copy_(last_state)
        return y

    return Implementation(run_in_place, tuple)


IMPLEMENTATIONS: Mapping[str, Implementation] = {**_OWN, **{f"{name}_": _in_place(name) for name in STATEFUL}}
"""By operator, without the namespace."""

_registered: list[Library] = []


def register(key: str = "CUDA") -> None:
    """Makes these the operators' kernels on CUDA; to be called once.

    Args:
        key: PyTorch's dispatch key; "CPU" to rehearse, interpreted, what a GPU would run.
    """
    kernels = Library("mq_ao", "IMPL", key)
    _registered.append(kernels)  # which ends with the library
    for name, implementation in IMPLEMENTATIONS.items():
        kernels.impl(name, implementation.run, allow_override=True)
