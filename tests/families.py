"""What mq-ao does with the models of other libraries, captured as they are: the table of docs/support.md.

python -m tests.families    # prints it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mq_ao
from mq_ao.capture.stateful_export import export_with_states
from mq_ao.graph import match, walk
from mq_ao.graph.residual import streams
from mq_ao.lowering import inductor
from mq_ao.lowering.language_graphs import states_of
from tests import captured

RECIPE = "mambaquant-w8a8"
AS_MAMBA_LM = "yes, as `MambaLM`"
"""What `MambaLM.from_pretrained` loads, with states of one stack."""
OFF = "switched off by the configuration"
"""The gate's operands: a choice of the recipe, the same for all."""
HEADER = ("model", "Mamba blocks", "R1", "int8 linears", "in float, and why", "decoding with states")


@dataclass(frozen=True)
class Family:
    """What was measured of one model.

    Attributes:
        name: of the model.
        blocks: Mamba blocks that were matched, of `scans` scans.
        scans: scans in the graph.
        rotated: why R1 was left out, or None.
        linears: linears that run in int8, of `all_linears`.
        all_linears: linears in the graph.
        left_out: reasons why parts stay in float, each once.
        in_float: number of these parts.
        decodes: how its programs decode with states, or "no".
        capture_error: largest difference of the captured graph to the library's own forward, relative.
        integer_error: relative L2 distance of the integer program to the q/dq simulation.
    """

    name: str
    blocks: int
    scans: int
    rotated: str | None
    linears: int
    all_linears: int
    left_out: tuple[str, ...]
    in_float: int
    decodes: str
    capture_error: float
    integer_error: float

    @property
    def row(self) -> tuple[str, ...]:
        """Cells of the table."""
        why = "; ".join(self.left_out) or "nothing"
        return (
            self.name,
            f"{self.blocks} of {self.scans}",
            "yes" if self.rotated is None else f"no: {self.rotated}",
            f"{self.linears} of {self.all_linears}",
            why,
            self.decodes,
        )


class Logits(nn.Module):
    """A language model of another library as a function of token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, length) -> logits (batch, length, vocabulary)."""
        return self.model(ids).logits


def measure(name: str, model: nn.Module, eager: Callable[[Tensor], Tensor], *, decodes: str, vocab: int) -> Family:
    """Captures, matches, quantizes and runs one model.

    Args:
        name: of the model.
        model: of another library, ids -> an output with `logits`.
        eager: the library's own forward, ids -> logits.
        decodes: how its programs decode with states, or "no".
        vocab: number of tokens.
    """

    def tokens(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))

    whole, probe = Logits(model).eval(), tokens(3, 11, seed=1)
    graph = mq_ao.export(whole, (tokens(2, 5),)).module(check_guards=False)
    found = match(graph)
    problems = dict.fromkeys(stream.problem for stream in streams(graph, found.blocks))
    scans = {torch.ops.mq_ao.selective_scan.default, torch.ops.mq_ao.ssd_scan.default}
    quantized = mq_ao.quantize(whole, [(tokens(4, 40, seed=2),)], RECIPE)
    integer = inductor.rewrite(quantized.converted)
    with torch.no_grad():
        simulated, got = quantized.converted(probe), integer.module(probe)
        capture_error = captured.difference(graph(probe), eager(probe))
    decisions = quantized.report().quantization.decisions
    reasons = [item.detail for item in decisions if not item.accepted and item.detail != OFF]
    remaining = walk.calls(integer.module, walk.LINEAR | walk.EXPERTS)
    linears = walk.calls(graph, walk.LINEAR | walk.EXPERTS)
    return Family(
        name=name,
        blocks=len(found.blocks),
        scans=sum(node.target in scans for node in graph.graph.nodes),
        rotated=next((_short(problem) for problem in problems if problem), None),
        linears=len(linears) - len(remaining),
        all_linears=len(linears),
        left_out=tuple(dict.fromkeys(reasons)),
        in_float=len(reasons),
        decodes=decodes,
        capture_error=capture_error,
        integer_error=float((got - simulated).norm() / simulated.norm()),
    )


def _short(reason: str) -> str:
    """A reason without the name of the node that it was found at."""
    return reason.rpartition(": ")[2] if reason.startswith("the walk along") else reason


def transformers_families() -> Iterator[Family]:
    """Every model of `test_capture_transformers`."""
    from tests import test_capture_transformers as source

    for name in source.MODELS:
        model = source.build(name)

        def eager(ids: Tensor, model: nn.Module = model) -> Tensor:
            return model(ids, use_cache=False).logits

        decodes = decoding(model)
        yield measure(name, model, eager, decodes=decodes, vocab=source.VOCAB)


def mamba_ssm_families() -> Iterator[Family]:
    """`MambaLMHeadModel` with both kinds of layers, its norms fused with the additions.

    Raises:
        MqAoError: mamba_ssm is not installed.
    """
    from tests import test_capture_mamba_ssm as source
    from tests.test_mamba_ssm_states import WITH_STATES

    with source.package() as package:
        run = source.by_references()
        rows = [("Mamba1", "no attention"), ("Mamba2", "no attention"), ("Mamba2", "attention")]
        for layer, kind in rows:
            model = source.language_model(package, layer, **WITH_STATES[kind])

            def eager(ids: Tensor, model: nn.Module = model) -> Tensor:
                return run(model, ids)

            name = f"mamba_ssm, {layer}" + (", attention" if kind == "attention" else "")
            decodes = decoding(model) if kind == "attention" else AS_MAMBA_LM
            yield measure(name, model, eager, decodes=decodes, vocab=64)


def decoding(model: nn.Module) -> str:
    """How programs of a model of transformers decode."""
    if type(model).__name__ in ("MambaForCausalLM", "Mamba2ForCausalLM"):
        return AS_MAMBA_LM
    try:
        states = states_of(export_with_states(model).module(check_guards=False))
    except mq_ao.MqAoError:
        return "no"
    return "yes, keys and values too" if any(item.grows for item in states.items) else "yes"


def table(families: Iterable[Family]) -> str:
    """Markdown."""
    rows = [HEADER, *(family.row for family in families)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(HEADER), *lines[1:]])


if __name__ == "__main__":
    print(table([*mamba_ssm_families(), *transformers_families()]))
