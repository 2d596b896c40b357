"""Refuses Python loops over the sequence before they are traced: unrolled, they take minutes and fix the length."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mq_ao.capture import frames
from mq_ao.compat.operators import TorchDispatchMode
from mq_ao.compat.trees import tree_leaves, tree_map
from mq_ao.errors import MqAoError

logger = logging.getLogger(__name__)

_SHORT = 6
_IMAGES = 4
_STEPS = 64
"""Steps through an axis of a tensor, one by one, that are taken for a loop over time: more than there are heads."""


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
        self.stepping: set[tuple[CodeType, int]] = set()
        self._indices: dict[tuple[CodeType, int], tuple[int, int]] = {}

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
            key = self.count(frame)
            if getattr(func, "__name__", "") in _INDEXING and self._step(key, args[1:]):
                self.stepping.add(key)
        return func(*args, **(kwargs or {}))

    def count(self, frame: FrameType) -> tuple[CodeType, int]:
        """Counts a call from where a frame is now."""
        key = (frame.f_code, frame.f_lasti)
        self.counts[key] += 1
        if key not in self.calls:
            around = list(frames.own_frames(frame))
            scan = next((frames.key_of(item) for item in around if frames.looks_like_scan(item)), None)
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frames.key_of(frame)}"
            self.calls[key] = _Call(len(around), place, scan)
        return key

    def _step(self, key: tuple[CodeType, int], index: Any) -> bool:
        """Whether an instruction has indexed tensors by that many numbers in a row."""
        numbers = [item.start if isinstance(item, slice) else item for item in tree_leaves(index)]
        number = next((item for item in reversed(numbers) if type(item) is int), 0)
        last, count = self._indices.get(key, (number, 0))
        count = count + 1 if abs(number - last) == 1 else 1
        self._indices[key] = number, count
        return count >= _STEPS


class _ScriptedCalls(TorchDispatchMode):
    """Counts the operators of scripted functions, which are no calls of torch to the mode above, for their caller."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        frame = next(frames.own_frames(sys._getframe(1)), None)
        if frame is not None and frame.f_code is not _Calls.__torch_function__.__code__:
            self.calls.count(frame)
        return func(*args, **(kwargs or {}))


_INDEXING = frozenset({"__getitem__", "select", "narrow"})


def refuse_loops(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, whole: bool = False) -> None:
    """Checks that a model without a scan operator does not loop over its sequence in Python.

    The model runs on two short lengths, and each instruction's calls of torch are counted: those that become more with
    the length are such a loop, and those of 64 layers are not. If it runs on one length alone, an instruction that
    takes an axis of a tensor apart step by step is one.

    Args:
        module: model in eval mode.
        args: example positional inputs.
        kwargs: example keyword inputs.
        whole: look at all of a model that calls a scan operator too; else it is left at that call.

    Raises:
        MqAoError: it does.
    """
    for shorter, longer in _lengths(args, kwargs):
        try:
            many = _calls(module, *longer, whole=whole)
        except _KnownScan:
            return
        except Exception as error:  # It may have a shortest length; if it does not run at all, torch.export will tell.
            logger.debug("%s does not run on a shorter input: %s", type(module).__name__, error)
            continue
        try:
            few = _calls(module, *shorter, whole=whole)
        except Exception as error:  # It may have but one length.
            logger.debug("%s does not run on a shorter input: %s", type(module).__name__, error)
            found = list(many.stepping)
        else:
            found = [key for key, count in many.counts.items() if count > few.counts[key]]
            if not found:
                return
        if found:
            raise MqAoError(_advice(min((many.calls[key] for key in found), key=lambda call: call.depth)))


def _calls(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, whole: bool) -> _Calls:
    calls = _Calls(whole=whole)
    with _ScriptedCalls(calls), calls:
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
