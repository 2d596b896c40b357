"""The stages, in order of worth, and how long each may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mq_ao.errors import MqAoError

_STAGES = "mq_ao.gpu_check.stages"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: what it is called.
        title: what it finds out.
        module: the one whose `parts` it runs, a file of `stages`.
        expected: seconds that it is thought to take on a GPU: with less left it does not begin. None was measured.
        limit: seconds after which it is ended, on a GPU.
        options: what else `parts` is given.
        part_limit: seconds after which one part is ended, so that the next ones have their turn.
    """

    name: str
    title: str
    module: str
    expected: float
    limit: float = 90.0
    options: Mapping[str, str] = field(default_factory=dict)
    part_limit: float = 60.0


def _speed(name: str, title: str, expected: float, shape: str, phase: str) -> Stage:
    # Its first part makes the programs for the others.
    return Stage(name, title, f"{_STAGES}.speed", expected, options={"shape": shape, "phase": phase}, part_limit=80.0)


STAGES = (
    Stage("machine", "versions, device, one product of each kind, one copy", f"{_STAGES}.machine", 15),
    Stage("kernels", "every Triton kernel against its reference at three drawn shapes", f"{_STAGES}.kernels", 60),
    Stage("bundled", "the bundled model: GPU against CPU, same program", f"{_STAGES}.bundled", 60),
    _speed("decode-2.8b", "decode of the 2.8b shape, against fp16", 75, "mamba-2.8b", "decode"),
    _speed("prefill-2.8b", "prefill of the 2.8b shape, against fp16", 60, "mamba-2.8b", "prefill"),
    Stage("configurations", "times of configurations, beside the roofline", f"{_STAGES}.configurations", 60),
    _speed("decode-130m", "decode of the 130m shape, against fp16", 75, "mamba-130m", "decode"),
    _speed("prefill-130m", "prefill of the 130m shape, against fp16", 60, "mamba-130m", "prefill"),
    _speed("mamba2", "decode of the Mamba-2 130m shape, against fp16", 60, "mamba2-130m", "decode"),
    _speed("mamba2-prefill", "prefill of the Mamba-2 130m shape, against fp16", 60, "mamba2-130m", "prefill"),
    Stage(
        "vim",
        "the bundled classifier: GPU against CPU, same program",
        f"{_STAGES}.vim",
        45,
    ),
)
"""All stages."""

FAILED = "failed"
"""What `again` calls the parts that failed, of all stages."""


def chosen(names: Sequence[str], what: str, also: tuple[str, ...] = ()) -> list[Stage]:
    """Stages by name, in order.

    Raises:
        MqAoError: there is none of that name; `what` is the option that named it.
    """
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in (*known, *also)]:
        raise MqAoError(f"{what} {unknown[0]!r}: there is no such stage; they are {', '.join((*known, *also))}.")
    return [stage for stage in STAGES if stage.name in names]
