"""Language models of every kind as programs for ExecuTorch: states of heads and convolutions, caches of attention."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.executorch import ExecutorchProgram, Options, Scan
from mq_ao.lowering.language_graphs import flat, states_of
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models import Mamba2Config, Mamba2LM
from mq_ao.models.generate import generate
from mq_ao.quantized import QuantizedModel
from tests.test_capture_states import captured, ids_of
from tests.test_capture_transformers import VOCAB
from tests.test_executorch import FLIPPED_STEPS, relative

pytest.importorskip("executorch", reason='needs pip install "mq-ao[executorch]"')

from executorch.runtime import Runtime

from mq_ao.lowering.executorch.state_buffers import buffers, keep_states

PIECE, CONTEXT = 8, 24
CASES = [("Mamba-2", Scan.NATIVE), ("Mamba-2", Scan.PORTABLE), ("Bamba", Scan.NATIVE), ("Bamba", Scan.PORTABLE)]


def model_of(name: str) -> nn.Module:
    if name != "Mamba-2":
        return captured(name)[0]
    torch.manual_seed(0)
    shape = {"d_model": 64, "n_layer": 1, "headdim": 16, "d_state": 32}
    return Mamba2LM(Mamba2Config(vocab_size=VOCAB, **shape)).eval()


@functools.cache
def quantized(name: str) -> QuantizedModel:
    return mq_ao.quantize(model_of(name), [ids_of(4, 32, seed=1)], "mambaquant-w8a8", backend="executorch")


@functools.cache
def lowered(name: str, scan: Scan) -> ExecutorchProgram:
    options = Options(max_length=PIECE, max_context=CONTEXT, scan=scan)
    program = quantized(name).lower(options=options)
    assert isinstance(program, ExecutorchProgram)
    return program


def simulation(name: str, program: ExecutorchProgram) -> StatefulGraph:
    return StatefulGraph(quantized(name).converted, program.carried)


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_pieces_and_steps_equal_the_simulation(name: str, scan: Scan) -> None:
    program, ids = lowered(name, scan), ids_of(1, CONTEXT, seed=2)
    expected = simulation(name, program)(ids)[0]
    runs = []
    for _ in range(2):  # the second starts from a reset
        every, *states = program(ids[:, :13])  # in two pieces
        logits = [every]
        for place in range(13, CONTEXT):
            step, *states = program.decode(ids[:, place : place + 1], *states)
            logits.append(step)
        runs.append(torch.cat(logits, dim=1))
    assert torch.equal(*runs)
    assert relative(runs[0], expected) < FLIPPED_STEPS


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_programs_say_what_they_are(name: str, scan: Scan, tmp_path: Path) -> None:
    program = lowered(name, scan)
    native = scan is Scan.NATIVE
    assert ("mq_ao::qssd_scan" in program.integer_kernels) is native
    assert bool(program.info["simulated"]) is not native
    for method in ("prefill", "decode"):
        found = program.info["methods"][method]
        assert found["linears_outside"] == 0
        names = {operator for operator in found["outside"] if "mq_ao" in operator}
        assert ("mq_ao::attention_into_cache" in names) is (native and name == "Bamba")
        assert native or not names
    program.save(tmp_path / "model.pte")
    loaded = mq_ao.load(tmp_path / "model.pte")
    prompt = ids_of(1, 5, seed=3)
    assert torch.equal(loaded.generate(prompt, 8), program.generate(prompt, 8))
    methods = Runtime.get().load_program(tmp_path / "model.pte").method_names
    assert ("get_max_context_len" in methods) is (name == "Bamba")


def test_a_conversation_ends_with_the_cache() -> None:
    program = lowered("Bamba", Scan.NATIVE)
    message = f"{CONTEXT} tokens and 1 more do not fit into this program's context of {CONTEXT}: lower the model again"
    with pytest.raises(MqAoError, match=message):
        program.generate(ids_of(1, CONTEXT - 1), 3)
    with pytest.raises(MqAoError, match=f"0 tokens and {CONTEXT + 1} more"):
        program.prefill(ids_of(1, CONTEXT + 1))
    _, *states = program.prefill(ids_of(1, CONTEXT))
    with pytest.raises(MqAoError, match=message):
        program.decode(ids_of(1, 1), *states)
    # What was refused changed nothing, and a model without a cache has no such limit.
    assert program.generate(ids_of(1, CONTEXT - 2), 2).shape == (1, CONTEXT)
    assert lowered("Mamba-2", Scan.NATIVE).generate(ids_of(1, CONTEXT), 8).shape == (1, CONTEXT + 8)


class Kept(nn.Module):
    """A graph that keeps its states, run by PyTorch, as a step that takes them."""

    def __init__(self, graph: GraphModule, batch: int) -> None:
        super().__init__()
        states = states_of(graph)
        self.graph, self.count = flat(graph), len(states.items)
        keep_states(self.graph, states, buffers(states, batch, CONTEXT))

    def forward(self, ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        (logits,) = self.graph(ids)
        return logits, *[ids.new_zeros(len(ids))] * self.count


@pytest.mark.parametrize(
    "name", ["FalconMamba", "Jamba", "Zamba2", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Bamba", "Mamba2"]
)
def test_states_of_every_family_become_buffers(name: str) -> None:
    _, graph = captured(name)
    prompt = ids_of(2, 7, seed=4)
    got = generate(Kept(graph, 2), prompt, CONTEXT - 7)
    assert torch.equal(got, generate(StatefulGraph(graph), prompt, CONTEXT - 7))


def test_what_cannot_become_a_cache_is_named() -> None:
    _, graph = captured("Bamba")
    states, changed = states_of(graph), flat(graph)
    key = next(node for node in changed.graph.find_nodes(op="placeholder") if str(node.target).startswith("key"))
    (output,) = changed.graph.find_nodes(op="output")
    with changed.graph.inserting_before(output):
        total = changed.graph.call_function(torch.ops.aten.sum.default, (key,))
        logits = changed.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0][0], total))
    output.args = ((logits, *output.args[0][1:]),)
    with pytest.raises(MqAoError, match="sum.* reads key_1 otherwise than attention does: it cannot be a cache"):
        keep_states(changed, states, buffers(states, 1, CONTEXT))
