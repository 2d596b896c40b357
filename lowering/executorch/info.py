"""What a program says of itself, in methods that give constants."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from mq_ao import tokenizer

INFO = "mq_ao_info"
"""Everything, as JSON."""
FORWARD = "forward"
"""The method that ExecuTorch's LLM runner calls."""
MAX_LENGTH = "get_max_seq_len"
"""Longest prefill, under the name that ExecuTorch's own runners look for."""
MAX_CONTEXT = "get_max_context_len"
"""Tokens of a conversation, likewise; of programs that have such a limit."""
NO_LIMIT = 2**31 - 1
"""What the runner is told of programs without such a limit."""
VOCAB_SIZE = "get_vocab_size"
FORMAT = 2


def runner_constants(info: Mapping[str, Any]) -> dict[str, Any]:
    """What ExecuTorch's LLM runner asks of a program besides its sizes.

    Args:
        info: of the program; a tokenizer that is kept in it tells which tokens end a text.
    """
    found: dict[str, Any] = {"enable_dynamic_shape": True, "use_kv_cache": True, "use_sdpa_with_kv_cache": False}
    kept = info.get(tokenizer.INFO)
    if kept is None:
        return found
    restored = tokenizer.restored(kept)
    for name, value in (("get_bos_id", restored.bos_token_id), ("get_eos_ids", restored.eos_token_id)):
        if value is not None:
            found[name] = [value] if name == "get_eos_ids" else value
    return found


def versions() -> dict[str, str]:
    """Of what made a program."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchao", "executorch")}
