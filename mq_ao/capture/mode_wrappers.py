"""Grad modes and autocast inside a model's forward: torch.export wraps what is under them, and that hides it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from mq_ao.capture.replacing import Replacement

logger = logging.getLogger(__name__)

_HIGHER = torch.ops.higher_order
_WRAPPERS: dict[object, int] = {_HIGHER.wrap_with_set_grad_enabled: 1, _HIGHER.wrap_with_autocast: 4}
"""Where the wrapped graph stands among the arguments; what it is called with follows."""


def replacements() -> Iterator[Replacement]:
    """An autocast that is entered while a model is traced does nothing, and the log says so once."""
    enter = torch.amp.autocast.__enter__
    named: set[Any] = set()
    tracing = threading.get_ident()

    def disabled(self: torch.amp.autocast) -> Any:
        # The class is everyone's: what other threads enter in the meantime is what they asked for.
        if threading.get_ident() != tracing:
            return enter(self)
        if self._enabled and self.fast_dtype not in named:
            named.add(self.fast_dtype)
            logger.warning(
                "the model's own autocast to %s is left out: the captured program computes in the dtype of the weights",
                str(self.fast_dtype).removeprefix("torch."),
            )
        # The object may be the model's own, or that of a decorator, and is entered again after the capture.
        was, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = was

    yield Replacement(torch.amp.autocast, "__enter__", disabled)


def inline(program: ExportedProgram) -> None:
    """Puts what a program computes under a grad mode, or under an autocast that is off, where it is called from."""
    module, signature = program.graph_module, program.graph_signature
    while wrappers := [node for node in module.graph.nodes if node.target in _WRAPPERS]:
        for node in wrappers:
            for old, new in _inlined(module, node):
                signature.replace_all_uses(old, new)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _inlined(module: GraphModule, node: Node) -> Iterator[tuple[str, str]]:
    """Replaces a wrapper by its body; yields the names of its results before and after."""
    place = _WRAPPERS[node.target]
    wrapped: Any = node.args[place]
    body = module.get_submodule(wrapped.target)
    assert isinstance(body, GraphModule)
    for inner in body.graph.find_nodes(op="get_attr"):
        # A wrapper within it, whose body comes along.
        name = f"{wrapped.target}_{inner.target}"
        setattr(module, name, getattr(body, inner.target))
        inner.target = name
    values = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[place + 1 :], strict=True))
    with module.graph.inserting_before(node):
        results: Any = module.graph.graph_copy(body.graph, values)
    for user in list(node.users):
        result = results[user.args[1]]
        user.replace_all_uses_with(result)
        yield user.name, result.name
        module.graph.erase_node(user)
    module.graph.erase_node(node)
