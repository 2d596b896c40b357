"""A model of transformers whose modules have become one integer program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mq_ao.errors import MqAoError
from mq_ao.lowering.native.file import Saved
from mq_ao.lowering.native.program import NativeProgram
from mq_ao.lowering.native.program import program as program_of
from mq_ao.models.prompts import Ragged, lengths
from mq_ao.models.states import States
from mq_ao.models.token_inputs import token_ids

PLAN = "mq_ao_plan.json"
"""Name of the file that has the plan, beside the weights."""


def become(model: PreTrainedModel, saved: Saved) -> None:
    """Puts a native program in the place of a model's modules.

    Args:
        model: it keeps its name, configuration and `generate`.
        saved: its weights may lie on the meta device still: transformers then loads them.
    """
    for name in [*model._modules]:
        delattr(model, name)
    model.integers = Integers(saved)
    model.all_tied_weights_keys = {}  # each is there once
    kind = type(model)
    # Pipelines and `AutoModel` know models by the names of their classes.
    model.__class__ = type(kind.__name__, (QuantizedForCausalLM, kind), {"__module__": kind.__module__})


class Integers(nn.Module):
    """Weights and scales of a program, and the program, which reads them where they lie."""

    def __init__(self, saved: Saved) -> None:
        super().__init__()
        self._saved = saved
        for name, tensor in saved.weights.items():
            self.register_buffer(name, tensor)

    @cached_property
    def program(self) -> NativeProgram:
        """`(input_ids, *states) -> (logits, *states)`.

        Raises:
            MqAoError: there are no native kernels for this machine.
        """
        made = program_of(self.saved)
        assert isinstance(made, NativeProgram)
        return made

    @property
    def saved(self) -> Saved:
        """With the weights as they are."""
        buffers = dict(self.named_buffers())
        return replace(self._saved, weights={name: buffers[name] for name in self._saved.weights})

    @property
    def info(self) -> Mapping[str, Any]:
        """Recipe, kernel counts, states and vocabulary."""
        return self._saved.info


class Carried:
    """What goes on after a call: transformers hands it on as `past_key_values`.

    Attributes:
        step: what reads the next tokens, with `states`.
        states: after the last.
        length: tokens that were read, padding included.
    """

    is_compileable = False

    def __init__(self, step: Any, states: tuple[Any, ...], length: int, items: States) -> None:
        self.step, self.states, self.length, self._items = step, states, length, items

    @property
    def apart(self) -> bool:
        """Whether rows of different lengths go on in batches of their own."""
        return isinstance(self.step, Ragged) and any(item.grows for item in self._items.items)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with these rows, as beam search asks for."""
        if self.apart:
            raise MqAoError("beams of padded prompts are not possible with attention: give prompts of one length.")
        self.states = self._items.taken(self.states, beam_idx)


class QuantizedForCausalLM(PreTrainedModel, GenerationMixin):
    """What replaces a model's own methods; see `become`."""

    integers: Integers
    _is_stateful = True  # no way back to earlier tokens, as assisted decoding needs
    _tied_weights_keys = None
    _supports_attention_backend = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Carried | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits and, as `past_key_values`, what goes on after them.

        Args:
            input_ids: (batch, length) int64.
            attention_mask: (batch, length), 0 for padding, on the left; with `past_key_values`, all are tokens.
            past_key_values: what the last call gave.
            use_cache: whether to give it.
            logits_to_keep: of so many last tokens; 0: of all.
            labels: (batch, length), -100 where none: of these the loss is given.
            return_dict: False for a tuple.
            kwargs: what other models take; hidden states and embeddings are refused.

        Raises:
            MqAoError: the ids are not those of the vocabulary, the mask has padding elsewhere, or something is asked
                for that is not there.
        """
        for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise MqAoError(f"{name}: a quantized model takes token ids and gives logits alone.")
        if input_ids is None:
            raise MqAoError("input_ids are missing.")
        if past_key_values is not None and not isinstance(past_key_values, Carried):
            raise MqAoError(f"past_key_values is a {type(past_key_values).__name__}: give what the last call returned.")
        every = labels is not None or not isinstance(logits_to_keep, int) or logits_to_keep != 1
        with torch.no_grad():
            logits, carried = self._run(input_ids, attention_mask, past_key_values, every)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        kept = logits[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        output = CausalLMOutputWithPast(
            loss=loss if labels is not None else None,
            logits=kept,
            past_key_values=carried if use_cache is not False else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _run(self, ids: Tensor, mask: Tensor | None, past: Carried | None, every: bool) -> tuple[Tensor, Carried]:
        program = self.integers.program
        ids = token_ids(ids, self.integers.info["vocab_size"])
        step = program if every else program.prefill
        length = ids.shape[1]
        if past is not None:
            if past.apart and length > 1:
                raise MqAoError("padded prompts go on token by token in models with attention: give one token a row.")
            run = past.step if isinstance(past.step, Ragged) else program.step
            logits, *states = (run if length == 1 else step)(ids, *past.states)
            return logits, Carried(run, tuple(states), past.length + length, program.carried)
        counts = [length] if mask is None else lengths(ids, mask)
        if set(counts) == {length}:
            logits, *states = step(ids)
            return logits, Carried(step, tuple(states), length, program.carried)
        if every:
            raise MqAoError("logits of all tokens of padded rows are not given: run rows of one length each.")
        ragged = Ragged(program.step, counts, program.carried)
        logits, *states = ragged(ids)
        return logits, Carried(ragged, tuple(states), length, program.carried)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Carried | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See `GenerationMixin`: the next tokens alone, and logits of the last."""
        ids = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        return {
            "input_ids": ids,
            "attention_mask": None if past_key_values is not None else attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Integers, scales and the plan; `from_pretrained` reads them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.integers.saved.write_plan(folder / PLAN)  # first: what uploads the folder is in the other call
        super().save_pretrained(folder, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits; config.json keeps it."""
        return torch.float32

    def get_input_embeddings(self) -> nn.Module:
        """There are none any more; this error is by which transformers knows such models, and it goes on."""
        raise NotImplementedError("a quantized model has no modules of its own.")

    def get_output_embeddings(self) -> None:
        """There are none any more."""
        return

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Each weight is there once."""

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The first call gives what goes on."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
