"""The functions that transformers' Mamba models call, and their norms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mq_ao.capture import carrying, norm_functions, scans
from mq_ao.capture.replacing import Replacement, imported
from mq_ao.errors import MqAoError
from mq_ao.ops.expert_linear import expert_linear


def replacements(module: nn.Module) -> Iterator[Replacement]:
    """What stands in for transformers' functions while `module` is captured; nothing if it is not imported.

    A model is captured without its cache: `use_cache` is False in its configuration.

    Raises:
        MqAoError: the installed transformers has no functions to replace.
    """
    if "transformers" not in sys.modules:
        return
    for name, part in module.named_modules():
        _require_functions(name, part)
    # Each model's file has functions of its own, under the same names.
    for source in imported("transformers.models."):
        for name, ours in _FUNCTIONS.items():
            if callable(vars(source).get(name)):
                yield Replacement(source, name, ours)
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "use_cache", False):
            yield Replacement(config, "use_cache", False)
    if (experts := sys.modules.get("transformers.integrations.moe")) is not None:
        yield Replacement(experts, "_grouped_mm", grouped_mm)
    if isinstance(module, carrying.Stateful):
        yield from _attention()
    yield from norm_functions.replacements(module, "transformers")


def _attention() -> Iterator[Replacement]:
    """Attention that reads the states, for which no mask is made."""
    from transformers import masking_utils, modeling_utils

    yield Replacement(modeling_utils.AttentionInterface, "get_interface", lambda *args: carrying.attention)
    yield Replacement(masking_utils, "_preprocess_mask_arguments", lambda *args, **kwargs: (True, *[None] * 6))


def without_cache(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs of a transformers model with `use_cache` off, as in its configuration."""
    theirs = type(module).__module__.startswith("transformers.") and "use_cache" in kwargs
    return {**kwargs, "use_cache": False} if theirs else dict(kwargs)


def _require_functions(name: str, part: nn.Module) -> None:
    """Older versions spell the scan out in Python: traced, it would be a loop unrolled for the example's length."""
    place = type(part).__module__
    if not place.startswith("transformers.models.") or not {"A_log", "D"} <= part._parameters.keys():
        return
    if not {"mamba_selective_scan", "mamba2_chunk_scan"} & vars(sys.modules[place]).keys():
        version = sys.modules["transformers"].__version__
        raise MqAoError(
            f"{name or 'the model'} ({type(part).__name__}) cannot be captured: transformers {version} has no function "
            "for its scan that could be replaced; install transformers 5.15 or newer."
        )


def grouped_mm(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """input (rows, K) sorted by expert, weight (experts, K, N), offs (experts,): where the rows of each end."""
    return expert_linear(input.to(weight.dtype), weight.mT.flatten(0, 1), offs)


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Any:
    """hidden_states (batch, channels, length)."""
    return scans.causal_conv1d_fn(hidden_states, weight, bias, kwargs.get("seq_idx"), activation=activation)


def mamba_selective_scan(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Any:
    """hidden_states, dt (batch, channels, length), B, C (batch, [groups,] d_state, length)."""
    options = _known(kwargs, _SCAN_OPTIONS)
    # A model with a cache asks for the last state in ways of its own.
    options["return_last_state"] = options.get("return_last_state", False) or carrying.current() is not None
    return scans.selective_scan_fn(hidden_states, dt, A, B, C, **options)


def mamba2_chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **kwargs: Any
) -> Any:
    """hidden_states (batch, length, heads, headdim), B, C (batch, length, groups, d_state)."""
    options = _known(kwargs, _CHUNK_SCAN_OPTIONS)
    options["return_final_states"] = options.get("return_final_states", False) or carrying.current() is not None
    return scans.mamba_chunk_scan_combined(hidden_states, dt, A, B, C, chunk_size, **options)


def _known(kwargs: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Models hand on whatever options they were called with; the kernels take those that they know."""
    return {name: value for name, value in kwargs.items() if name in names}


_SCAN_OPTIONS = frozenset({"D", "z", "delta_bias", "delta_softplus", "return_last_state"})
_CHUNK_SCAN_OPTIONS = frozenset(
    {
        "D",
        "z",
        "dt_bias",
        "initial_states",
        "seq_idx",
        "cu_seqlens",
        "dt_softplus",
        "dt_limit",
        "return_final_states",
    }
)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "mamba_selective_scan": mamba_selective_scan,
    "mamba2_chunk_scan": mamba2_chunk_scan,
}
