"""The states that language models carry from call to call, as inputs and outputs of a function.

A model never holds a state back from a layer in its library's own form: convolutions, scans and attention are functions
of ours while it is captured (see `scans`, `transformers` and `mamba_ssm`), and they read what was given and keep what
is new. A model of transformers is run with a cache of ours; one of mamba_ssm without, as for a whole sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mq_ao.capture.examples import signed
from mq_ao.errors import MqAoError
from mq_ao.ops.cached_attention import cached_attention

_CURRENT: ContextVar[Carried | None] = ContextVar("carried", default=None)
_CACHES = ("past_key_values", "cache_params")
"""How forward methods call their cache."""


class Carried:
    """A call's states by name, such as "conv_0" and "key_5": those given and those after it.

    It has the methods of transformers' `Cache` that models call; a model of mamba_ssm says with `enter` which layer
    runs.

    Args:
        given: the states before the call; where one is missing, it is that of a new sequence.

    Attributes:
        new: the states after the call, in the order in which layers run; of keys and values the new rows alone.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self._given = given
        self.new: dict[str, Tensor] = {}
        self._layer = 0

    def given(self, kind: str) -> Tensor | None:
        """A state of the layer that runs."""
        return self._given.get(f"{kind}_{self._layer}")

    def kept(self, kind: str) -> Tensor:
        """What is kept of the layer that runs."""
        return self.new[f"{kind}_{self._layer}"]

    def keep(self, kind: str, value: Tensor) -> None:
        """Keeps a state of the layer that runs.

        Raises:
            MqAoError: it was kept before, so that the model does not say which layer runs in a way that is known here.
        """
        name = f"{kind}_{self._layer}"
        if name in self.new:
            raise MqAoError(f"{name} is kept twice in one call: this version of the model's library is not supported.")
        self.new[name] = value

    @property
    def length(self) -> Any:
        """Tokens before the call, as far as attention layers know: an int or a symbolic size."""
        keys = [value for name, value in self._given.items() if name.startswith("key_")]
        return keys[0].shape[0] if keys else 0

    def enter(self, layer: int) -> None:
        """Says which layer runs."""
        self._layer = layer

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Says which layer runs; the convolution itself reads the state."""
        if state_idx:
            raise MqAoError(f"layer {layer_idx} carries several states of a kind, which is not supported.")
        self.enter(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """As `get_conv_state`."""
        self.get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """Says which layer runs, and what its convolution is to be applied to: the input itself."""
        self.enter(layer_idx)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> None:
        """Nothing: the scan has kept it."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps new keys and values (batch, heads, length, width), and says which layer runs."""
        self.enter(layer_idx)
        for kind, rows in (("key", key), ("value", value)):
            # Rows first: more of them then follow those before in memory, and nothing is moved.
            self.keep(kind, rows.permute(2, 0, 1, 3).contiguous())
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens before the call."""
        return self.length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Says which layer runs, if one asks; none is to take a way of its own for one token."""
        if layer_idx is not None:
            self.enter(layer_idx)
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        """Nothing is recorded."""
        return False


def carries_states(model: nn.Module) -> bool:
    """Whether a model is a language model of mamba_ssm, or one of transformers that takes a cache and gives logits."""
    if type(model).__module__.startswith("mamba_ssm.models."):
        return True
    if not type(model).__module__.startswith("transformers.models.") or not hasattr(model, "generate"):
        return False
    theirs: Any = model
    has_cache = any(name in inspect.signature(theirs.forward).parameters for name in _CACHES)
    return has_cache and theirs.get_output_embeddings() is not None


def current() -> Carried | None:
    """The states of the call that runs; None: it carries none."""
    return _CURRENT.get()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of new tokens to those before them and to each other: `mq_ao::cached_attention`.

    Args:
        module: that calls it.
        query: (batch, heads, length, width).
        key: that of the new tokens, as `Carried.update` returned it.
        value: likewise.
        attention_mask: None.
        scaling: of the scores; None: width to the power of -1/2.

    Returns:
        (batch, length, heads, width), and None for the weights.

    Raises:
        MqAoError: it has a window, soft caps or sinks, or there is a mask.
    """
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown or attention_mask is not None:
        what = ", ".join(unknown) or "a mask"
        raise MqAoError(f"attention with {what} ({type(module).__name__}) is not supported in a model with states.")
    return attend(query, scaling), None


def attend(query: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the layer that runs, whose new keys and values are kept: (batch, length, heads, width)."""
    carried = current()
    assert carried is not None
    return cached_attention(
        query,
        carried.kept("key"),
        carried.kept("value"),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        carried.given("key"),
        carried.given("value"),
    )


class Stateful(nn.Module):
    """A language model of transformers or mamba_ssm as `(input_ids, *states) -> (logits, *states)`.

    States are those that the model carries: of convolutions (batch, d_conv - 1, channels), of scans (batch, ...), and
    keys and values (tokens before, batch, heads, width), of which the new rows are given, to be appended.

    Args:
        model: `...ForCausalLM` or `MambaLMHeadModel`, in eval mode.
        names: of the states, as `Carried.new` has them; none: it is called without.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        known = inspect.signature(model.forward).parameters
        self._cache = next((name for name in _CACHES if name in known), None)
        # mamba_ssm's take positions and read none.
        self._takes_positions = self._cache is not None and "position_ids" in known
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("input_ids", *names)]

        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            logits, new = self.run(*inputs)
            return logits, *new.values()

        self.forward = signed(forward, inspect.Signature(parameters))
        self.eval()

    def run(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (batch, length, vocab_size), and the states after the call by name."""
        carried = Carried(dict(zip(self.names, states, strict=True)))
        given: dict[str, Any] = {} if self._cache is None else {self._cache: carried, "use_cache": True}
        if self._takes_positions:
            first = carried.length
            positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            given["position_ids"] = positions[None]
        with _carrying(carried):
            logits = self.model(input_ids, **given).logits
        return logits, carried.new


@contextmanager
def _carrying(carried: Carried) -> Iterator[None]:
    token = _CURRENT.set(carried)
    try:
        yield
    finally:
        _CURRENT.reset(token)
