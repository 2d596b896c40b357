"""What a program says of itself, in methods that give constants."""

from __future__ import annotations

import importlib.metadata

INFO = "mq_ao_info"
"""Everything, as JSON."""
MAX_LENGTH = "get_max_seq_len"
"""Longest prefill, under the name that ExecuTorch's own runners look for."""
MAX_CONTEXT = "get_max_context_len"
"""Tokens of a conversation, likewise; of programs that have such a limit."""
VOCAB_SIZE = "get_vocab_size"
FORMAT = 2


def versions() -> dict[str, str]:
    """Of what made a program."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchao", "executorch")}
