"""Scans that a model computes by functions of its own, in whose place our operator is captured."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import BoundArguments, Parameter, Signature
from typing import Any

from torch import Tensor, nn

from mq_ao.capture import agreement, frames
from mq_ao.capture.functions import Key, Place, places
from mq_ao.capture.reading import SelectiveScan
from mq_ao.capture.replacing import replaced
from mq_ao.capture.unrolled import refuse_loops
from mq_ao.errors import MqAoError

logger = logging.getLogger(__name__)

Scans = Mapping[Key, SelectiveScan]
_ACTIVE: ContextVar[Scans] = ContextVar("scans", default={})  # noqa: B039  (never written to)


@contextmanager
def using_scans(scans: Scans) -> Iterator[None]:
    """Within it, `mq_ao.export` and whatever calls it take these scans, as if they were given as `scans`.

    Raises:
        MqAoError: they are no mapping.
    """
    if not isinstance(scans, Mapping):
        raise MqAoError(
            f"scans is of type {type(scans).__name__}: give a dictionary such as "
            '{"MambaBlock.selective_scan": mq_ao.capture.SelectiveScan()}.'
        )
    token = _ACTIVE.set({**_ACTIVE.get(), **scans})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def swapped(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], scans: Scans | None) -> Iterator[None]:
    """Puts our scan in the place of the functions that are named, once it is known to compute the same.

    For that the model runs once on the example inputs. Then, with our operator in place, it is looked for loops over
    the sequence that are left (`unrolled.refuse_loops`).

    Args:
        module: model in eval mode.
        args: example positional inputs.
        kwargs: example keyword inputs.
        scans: what the functions are, by name (see `functions.places`) or themselves.

    Raises:
        MqAoError: there is no such function, it is not called, it computes something else, or a loop is left.
    """
    swaps = [_Swap.of(module, args, kwargs, *item) for item in {**_ACTIVE.get(), **(scans or {})}.items()]
    if swaps:
        with replaced(place.replaced_by(swap.watched(place)) for swap in swaps for place in swap.places):
            _run(module, args, kwargs)
        for swap in swaps:
            if swap.reading is None:
                raise MqAoError(f"{swap.label} is never called by the model.{_existing(module, args, kwargs)}")
    with replaced(place.replaced_by(swap.ours) for swap in swaps for place in swap.places):
        # Who names scans names all of them: a loop that is left in another layer was forgotten.
        refuse_loops(module, args, kwargs, whole=bool(swaps))
        yield


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        frames.run(module, args, kwargs)
    except MqAoError:
        raise
    except Exception as error:
        raise MqAoError(f"{type(module).__name__} does not run on the example inputs: {error}") from error


def _existing(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    try:
        names = frames.called(module, args, kwargs)
    except Exception as error:  # The message is about something else.
        logger.debug("%s does not run on the example inputs: %s", type(module).__name__, error)
        return ""
    return f" It calls {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}." if names else ""


class _Swap:
    """One entry of `scans`."""

    def __init__(self, label: str, given: SelectiveScan, found: list[Place], signature: Signature) -> None:
        self.label = label
        self.given = given
        self.places = found
        self.signature = signature
        self.reading: SelectiveScan | None = None

    @classmethod
    def of(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], key: Key, given: SelectiveScan
    ) -> _Swap:
        label = f"scans[{key!r}]" if isinstance(key, str) else f"{getattr(key, '__qualname__', key)} of scans"
        if not isinstance(given, SelectiveScan):
            raise MqAoError(f"{label} is {given!r}: give a mq_ao.capture.SelectiveScan.")
        found = places(module, key)
        if not found:
            raise MqAoError(
                f"{label}: there is no such method of the model or its classes, and no such function."
                f"{_existing(module, args, kwargs)}"
            )
        try:
            signature = found[0].parameters()
        except ValueError as error:
            raise MqAoError(f"{label}: the names of its parameters cannot be found out ({error}).") from error
        return cls(label, given, found, signature)

    def watched(self, place: Place) -> Any:
        """The function itself, compared with ours at every call: at the first on random inputs too."""
        original = place.function

        def body(owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            first = [owner] if place.is_method else []
            bound = self._bound(args, kwargs)
            values = _by_name(bound)

            def function(values: Mapping[str, Any]) -> Any:
                given = _filled(bound, values)
                return original(*first, *given.args, **given.kwargs)

            # A function may write to its arguments.
            copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
            call = agreement.Call(owner, copies, function)
            result = call.function(values)
            if self.reading is None:
                self.reading = agreement.reading_of(self.label, self.given, call, result)
                logger.info("%s is %s", self.label, self.reading)
            else:
                agreement.check(self.label, self.reading, call, result)
            return result

        return body

    def ours(self, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Our operator, called as the function is."""
        assert self.reading is not None
        return self.reading.compute(_by_name(self._bound(args, kwargs)), owner)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundArguments:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound


def _by_name(bound: BoundArguments) -> dict[str, Any]:
    """The arguments of a call, those in **kwargs too."""
    kinds = bound.signature.parameters
    named = {name: value for name, value in bound.arguments.items() if kinds[name].kind not in _VARIABLE}
    rest = [value for name, value in bound.arguments.items() if kinds[name].kind is Parameter.VAR_KEYWORD]
    return {**named, **(rest[0] if rest else {})}


def _filled(bound: BoundArguments, values: Mapping[str, Any]) -> BoundArguments:
    """The call with other values."""
    filled = BoundArguments(bound.signature, OrderedDict(bound.arguments))
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            filled.arguments[name] = {key: values[key] for key in bound.arguments[name]}
        elif parameter.kind is not Parameter.VAR_POSITIONAL:
            filled.arguments[name] = values[name]
    return filled


_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
