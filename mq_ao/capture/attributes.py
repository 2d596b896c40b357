"""Attributes of a model's modules, which its forward may set: while it is traced, to tensors without values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mq_ao.capture.frames import tensors

logger = logging.getLogger(__name__)

_STRUCTURE = ("_parameters", "_buffers", "_modules")


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of a model's modules back in the end, and what lists and dictionaries among them hold.

    A model that goes on from what it kept is warned about: a program starts from the same in every call.
    """
    before = [(name, part, _shallow(vars(part))) for name, part in model.named_modules()]
    try:
        yield
    finally:
        changed = _restored(before)
    if changed:
        logger.warning(
            "the model keeps values in %s while it runs: a captured program starts every call from what is there now",
            ", ".join(changed),
        )


def _restored(before: list[tuple[str, nn.Module, dict[str, tuple[Any, Any]]]]) -> list[str]:
    """Puts attributes back; names those that held tensors."""
    changed: list[str] = []
    for name, part, values in before:
        for key in [key for key in vars(part) if key not in _STRUCTURE]:
            if key in values and vars(part)[key] is values[key][0] and _same(values[key]):
                continue
            if tensors(vars(part)[key]):
                changed.append(".".join(filter(None, (name, key))))
            if key not in values:
                del vars(part)[key]
        for key, (value, content) in values.items():
            vars(part)[key] = value
            if type(value) is dict:
                value.clear()
                value.update(content)
            elif type(value) is list:
                value[:] = content
    return changed


def _shallow(values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of what it holds, one level deep."""
    return {
        key: (value, type(value)(value) if type(value) in (dict, list) else None)
        for key, value in values.items()
        if key not in _STRUCTURE
    }


def _same(pair: tuple[Any, Any]) -> bool:
    value, content = pair
    if type(value) is dict:
        return len(value) == len(content) and all(key in content and content[key] is value[key] for key in value)
    return type(value) is not list or (
        len(value) == len(content) and all(one is other for one, other in zip(value, content, strict=True))
    )
