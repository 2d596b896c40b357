"""Refuses Python loops over the sequence before they are traced: unrolled, they take minutes and fix the length."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mq_ao.capture import frames
from mq_ao.errors import MqAoError

logger = logging.getLogger(__name__)

_SHORT = 6
_IMAGES = 4


class _KnownScan(BaseException):
    """The model calls a scan operator of ours: nothing has to be found out. Not caught by the model's own code."""


@dataclass(frozen=True)
class _Call:
    """A place that calls torch.

    Attributes:
        depth: number of the user's functions around it.
        place: file, line and function.
        scan: key of the innermost function around it that looks like a scan, or None.
    """

    depth: int
    place: str
    scan: str | None


class _Calls(TorchFunctionMode):
    """Counts how often each instruction of the user's code calls torch."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.counts: Counter[tuple[CodeType, int]] = Counter()
        self.calls: dict[tuple[CodeType, int], _Call] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if (name := str(func)).startswith("mq_ao.") and "scan" in name:
            if not self.whole:
                raise _KnownScan
            return func(*args, **(kwargs or {}))
        frame = next(frames.own_frames(sys._getframe(1)), None)
        if frame is not None:
            key = (frame.f_code, frame.f_lasti)
            self.counts[key] += 1
            if key not in self.calls:
                around = list(frames.own_frames(frame))
                scan = next((frames.key_of(item) for item in around if frames.looks_like_scan(item)), None)
                place = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frames.key_of(frame)}"
                self.calls[key] = _Call(len(around), place, scan)
        return func(*args, **(kwargs or {}))


def refuse_loops(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, whole: bool = False) -> None:
    """Checks that a model without a scan operator does not loop over its sequence in Python.

    The model runs on two short lengths, and each instruction's calls of torch are counted: those that become more with
    the length are such a loop, and those of 64 layers are not. A model that calls a scan operator is left there, unless
    the whole of it is to be looked at.

    Raises:
        MqAoError: it does.
    """
    for shorter, longer in _lengths(args, kwargs):
        try:
            many, few = (_calls(module, *given, whole=whole) for given in (longer, shorter))
        except _KnownScan:
            return
        except Exception as error:  # The model may have one length, or a shortest one: torch.export will tell.
            logger.debug("%s does not run on a shorter input: %s", type(module).__name__, error)
            continue
        loops = [many.calls[key] for key, count in many.counts.items() if count > few.counts[key]]
        if loops:
            raise MqAoError(_advice(min(loops, key=lambda call: call.depth)))
        return


def _calls(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, whole: bool) -> _Calls:
    with _Calls(whole=whole) as calls:
        frames.run(module, args, kwargs)
    return calls


Given = tuple[tuple[Any, ...], Mapping[str, Any]]


def _lengths(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Given, Given]]:
    """Pairs of a shorter and a longer input: of few steps, and of half and all for models that take no fewer."""
    sequence = next((x for x in frames.tensors((args, kwargs)) if x.dim() > 1), None)
    if sequence is None:
        return
    full = sequence.shape[_time(sequence)]
    for length in dict.fromkeys([min(full, _SHORT), full]):
        if length > 1:
            yield _cut(args, kwargs, full, length // 2), _cut(args, kwargs, full, length)


def _time(x: Tensor) -> int:
    """The axis that is time in sequences, and height in images."""
    return 2 if x.dim() == _IMAGES else 1


def _cut(args: tuple[Any, ...], kwargs: Mapping[str, Any], full: int, length: int) -> Given:
    def cut(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[_time(x)] == full:
            return x.narrow(_time(x), 0, length)
        return x

    given: Given = tree_map(cut, (args, dict(kwargs)))
    return given


def _advice(loop: _Call) -> str:
    text = (
        f"{loop.place}: a Python loop over the sequence. Traced, it would be unrolled for the length of the example, "
        "and no scan could be found in it. "
    )
    if loop.scan is not None:
        return (
            text + f"Name the scan to have our operator in its place: scans={{{loop.scan!r}: SelectiveScan()}}"
            ", with mq_ao.capture.SelectiveScan."
        )
    return text + (
        "Let one function or method compute the scan, from x, dt, A, B and C, and name it to have our operator in its "
        'place: scans={"Class.method": SelectiveScan(x=..., dt=..., ...)}, with mq_ao.capture.SelectiveScan.'
    )
