"""Names of stored weights, and ours: those of mamba_ssm's `MambaLMHeadModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from mq_ao.errors import MqAoError

_Value = TypeVar("_Value")

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, DataParallel, FSDP and activation checkpointing write between the parts of a name."""
_BACKBONE = "backbone."
_HEAD = "lm_head.weight"
_PREFIXES = (_BACKBONE, "model.backbone.", "", "model.")
"""What may stand before the names of the blocks: a language model's, one inside a trainer's, and the base models of
transformers and of other libraries."""


def unwrapped(name: str) -> str:
    """The name that a weight has without the modules that wrap its model or parts of it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def renamed(weights: Mapping[str, _Value], name: Callable[[str], str]) -> dict[str, _Value]:
    """The weights by their new names.

    Raises:
        MqAoError: two of them would have one name.
    """
    found: dict[str, _Value] = {}
    sources: dict[str, str] = {}
    for old, value in weights.items():
        new = name(old)
        if new in found:
            raise MqAoError(f"weights {sources[new]} and {old} are both {new}: keep the one that is the model's.")
        found[new], sources[new] = value, old
    return found


def language_model_names(weights: Mapping[str, _Value]) -> dict[str, _Value]:
    """The weights of a language model, or of its base model, by our names.

    Raises:
        MqAoError: all names begin otherwise than those of any layout; or two weights would have one name.
    """
    prefix = _prefix(weights)

    def ours(name: str) -> str:
        if name in (_HEAD, f"model.{_HEAD}"):
            return _HEAD
        if name.startswith(prefix):
            name = _BACKBONE + name.removeprefix(prefix)
        # transformers' name of the embedding.
        return name.replace(f"{_BACKBONE}embeddings.", f"{_BACKBONE}embedding.")

    return renamed(weights, ours)


def _prefix(names: Iterable[str]) -> str:
    """What stands before the names of the first block's weights."""
    starts = {start for start, first, _ in (name.partition("layers.0.") for name in names) if first}
    known = [prefix for prefix in _PREFIXES if prefix in starts]
    if starts and not known:
        raise MqAoError(
            f'the names of its weights begin with "{min(starts)}" where "{_BACKBONE}" is expected: take that away, or '
            "save the language model alone."
        )
    return known[0] if known else _BACKBONE
