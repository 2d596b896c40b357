"""Decoding one token: states are overwritten where they lie, by the same operators' twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import capture, compile_float
from mq_ao.graph import walk
from mq_ao.lowering.cuda import CudaProgram, lower_float, rewrite
from mq_ao.lowering.cuda.decode_graph import one_token
from mq_ao.lowering.language_graphs import states_of, with_positions
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models import Mamba2Config, Mamba2LM, MambaLM
from mq_ao.models.generate import generate
from mq_ao.models.rows import Rows
from mq_ao.models.states import tensors
from mq_ao.ops.in_place import STATEFUL, state_index
from tests.conftest import tokens
from tests.test_capture_states import captured, ids_of
from tests.test_capture_transformers import VOCAB

mq = torch.ops.mq_ao
aten = torch.ops.aten


def operands(name: str) -> list[Any]:
    """Arguments for a step of an operator, with a state."""
    gen = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    def grid(*shape: int) -> list[Any]:
        return [torch.randint(-128, 128, shape, dtype=torch.int8, generator=gen), 0.03, 3]

    decay = -torch.rand(6, 4, generator=gen)
    taps = torch.randint(-127, 128, (6, 4), dtype=torch.int8, generator=gen)
    calls: dict[str, list[Any]] = {
        "causal_conv1d": [floats(3, 1, 6), floats(6, 4), None, floats(3, 3, 6), "silu"],
        "qcausal_conv1d": [*grid(3, 1, 6), taps, floats(6).abs(), None, floats(3, 3, 6), "silu", 0.1, 3],
        "selective_scan": [*(floats(3, 1, 6) for _ in "ud"), decay, *(floats(3, 1, 4) for _ in "BC")],
        "qselective_scan": [*grid(3, 1, 6), *grid(3, 1, 6), decay, *grid(3, 1, 4), *grid(3, 1, 4)],
        "ssd_scan": [floats(3, 1, 2, 8), floats(3, 1, 2), decay[:2, 0], *(floats(3, 1, 1, 4) for _ in "BC")],
        "qssd_scan": [*grid(3, 1, 2, 8), *grid(3, 1, 2), decay[:2, 0], *grid(3, 1, 1, 4), *grid(3, 1, 1, 4)],
    }
    rest: dict[str, list[Any]] = {
        "selective_scan": [None, None, True, floats(3, 6, 4)],
        "qselective_scan": [None, None, True, floats(3, 6, 4), None, None, 0],
        "ssd_scan": [None, None, True, 0.0, None, floats(3, 2, 8, 4), None],
        "qssd_scan": [None, None, True, 0.0, None, floats(3, 2, 8, 4), None, 0.1, 3],
    }
    return calls[name] + rest.get(name, [])


@pytest.mark.parametrize("name", STATEFUL)
def test_the_last_state_takes_the_place_of_the_first(name: str) -> None:
    args, twin = operands(name), getattr(mq, f"{name}_")
    expected, last_state = getattr(mq, name)(*args)
    torch.library.opcheck(twin.default, tuple(operands(name)))
    assert torch.equal(twin(*args), expected)
    assert torch.equal(args[state_index(name)], last_state)
    args[state_index(name)] = last_state.double()
    with pytest.raises(MqAoError, match=rf"{name}_: initial_state must be torch\.float32, as the last state is"):
        twin(*args)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_kernel_of_a_step_writes_over_the_state(name: str) -> None:
    pytest.importorskip("triton")
    from mq_ao.ops.triton import IMPLEMENTATIONS

    args = operands(name)
    expected, last_state = getattr(mq, name)(*args)
    # In place, and not by a copy.
    copies = [value.clone() if isinstance(value, Tensor) else value for value in args]
    assert IMPLEMENTATIONS[name].run(*copies, into=copies[state_index(name)])[1] is copies[state_index(name)]
    state = args[state_index(name)]
    y = IMPLEMENTATIONS[f"{name}_"].run(*args)
    # Integers may be a step off where float32 rounds otherwise.
    torch.testing.assert_close(y.float(), expected.float(), rtol=1e-5, atol=1e-5 if y.is_floating_point() else 1)
    torch.testing.assert_close(state, last_state, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tiny2() -> Mamba2LM:
    torch.manual_seed(0)
    return Mamba2LM(Mamba2Config(vocab_size=256, d_model=64, n_layer=2, d_state=8, headdim=16)).eval()


def targets(module: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def step_of(model: MambaLM | Mamba2LM, recipe: str | None, batches: list[Tensor]) -> tuple[Any, Any]:
    """The graph of any length, and that of a step."""
    if recipe is None:
        whole = with_positions(capture(model, ()))
    else:
        whole = rewrite(with_positions(mq_ao.quantize(model, batches, recipe, backend="cuda").converted)).module
    return whole, one_token(whole, states_of(whole))


@pytest.mark.parametrize("recipe", [None, "mambaquant-w8a8", "mambaquant-w4a16", "mambaquant-paper-w8a8"])
@pytest.mark.parametrize("family", ["tiny", "tiny2"])
def test_a_step_is_what_the_graph_computes_for_one_token(
    recipe: str | None, family: str, calibration: list[Tensor], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    whole, step = step_of(model, recipe, calibration)
    ids, positions = tokens(3, 4), torch.zeros(1, dtype=torch.int64)
    states = [state.clone() for state in model.initial_states(3)]
    kept = [state.clone() for state in states]
    with torch.no_grad():
        for index in range(4):
            expected, *kept = whole(ids[:, index : index + 1], *kept, positions)
            assert torch.equal(*step(ids[:, index : index + 1], *states, positions), expected)
    for state, wanted in zip(states, kept, strict=True):
        assert torch.equal(state, wanted)
    # The states of the paper's recipe pass through a simulated rounding, so they are copied.
    copied = targets(step).count(aten.copy_.default)
    assert copied == (recipe == "mambaquant-paper-w8a8" and family == "tiny")
    assert targets(step).count(aten.stack.default) == copied
    # Convolutions join in_proj, and scans dt_proj, where these are products of integers.
    layers = model.config.n_layer
    assert targets(step).count(mq.int8_conv_step_.default) == (layers if str(recipe).endswith("w8a8") else 0)
    joined = recipe == "mambaquant-w8a8" and family == "tiny"
    assert targets(step).count(mq.int8_scan_step_.default) == (layers if joined else 0)


HYBRIDS = ("FalconMamba", "Jamba", "Bamba", "Zamba2", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Jamba, experts")


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_step_of_a_hybrid_is_what_the_graph_computes(name: str) -> None:
    """Convolutions and scans overwrite their states, and attention gives its new rows."""
    _, graph = captured(name)
    states = states_of(graph)
    whole = with_positions(graph)
    step, positions = one_token(whole, states), torch.zeros(1, dtype=torch.int64)
    fixed = [item for item in states.items if not item.grows]
    assert targets(step).count(aten.copy_.default) == 0
    overwriting = {getattr(mq, f"{operator}_").default for operator in STATEFUL}
    assert sum(target in overwriting for target in targets(step)) == len(fixed)
    ids = ids_of(2, 5)
    given = kept = states.zeros(2)
    given = tuple(value if isinstance(value, Rows) else value.clone() for value in given)
    with torch.no_grad():
        for index in range(5):
            token = ids[:, index : index + 1]
            expected, *after = whole(token, *tensors(kept), positions)
            kept = states.after(kept, after)
            logits, *rows = step(token, *tensors(given), positions)
            assert torch.equal(logits, expected)
            new = iter(rows)
            given = tuple(value.append(next(new)) if isinstance(value, Rows) else value for value in given)
    for state, wanted in zip(tensors(given), tensors(kept), strict=True):
        assert torch.equal(state, wanted)


@pytest.mark.parametrize("name", ["FalconMamba", "Bamba"])
def test_programs_of_hybrids_generate(name: str, tmp_path: Path) -> None:
    model, graph = captured(name)
    quantized = mq_ao.quantize(model, [ids_of(4, 32, seed=1)], "mambaquant-w8a8", backend="cuda")
    program = quantized.lower()
    assert isinstance(program, CudaProgram) and not program.info["simulated"]
    prompt = ids_of(2, 6, seed=2)
    got = program.generate(prompt, 12)
    assert torch.equal(got, generate(StatefulGraph(quantized.converted, states_of(graph)), prompt, 12))
    program.save(tmp_path / "model.ptc")
    loaded = mq_ao.load(tmp_path / "model.ptc")
    assert torch.equal(loaded.generate(prompt, 12), got)
    # Sequences take turns, and those of different lengths go on as alone.
    streams = [program.stream(prompt[:1], 6), program.stream(prompt[1:], 6)]
    for first, second in zip(*streams, strict=True):
        assert first.shape == second.shape == (1, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = program.generate(prompt, 6, attention_mask=mask)
    assert torch.equal(padded[:1, 6:], program.generate(prompt[:1, 2:], 6)[:, 4:])
    assert torch.equal(padded[1:, 6:], got[1:, 6:12])


def test_compiled_decode_of_a_hybrid_is_not_replayed() -> None:
    """A CUDA graph is of one size, and keys grow."""
    program = lower_float(captured("Bamba")[1], {"vocab_size": VOCAB}).on("cpu", "reduce-overhead")
    prompt = ids_of(1, 6, seed=2)
    assert torch.equal(program.generate(prompt, 5), generate(StatefulGraph(captured("Bamba")[1]), prompt, 5))


def test_layers_may_share_taps(tiny: MambaLM, calibration: list[Tensor]) -> None:
    whole, _ = step_of(tiny, "mambaquant-w8a8", calibration)
    first, second, *_ = walk.calls(whole, {mq.qcausal_conv1d.default})
    shared = walk.arguments(first)["weight"]
    second.replace_input_with(walk.arguments(second)["weight"], shared)
    whole.recompile()
    step = one_token(whole, states_of(whole))
    states, positions = tiny.initial_states(2), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        expected, *_ = whole(tokens(2, 1), *states, positions)
        assert torch.equal(*step(tokens(2, 1), *states, positions), expected)


def test_the_compiler_keeps_it_in_place(tiny: MambaLM, calibration: list[Tensor]) -> None:
    program = mq_ao.quantize(tiny, calibration, "mambaquant-w8a8", backend="cuda").lower()
    assert isinstance(program, CudaProgram)
    compiled = program.on("cpu", "reduce-overhead")
    ids = tokens(2, 5)
    _, *states = program.prefill(ids)
    (logits, *after), (code,) = run_and_get_code(lambda: compiled.decode(ids[:, :1], *states))
    expected, *wanted = program.decode(ids[:, :1], *states)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    for state, value in zip(after, wanted, strict=True):
        torch.testing.assert_close(state, value, rtol=1e-5, atol=1e-6)
    called = code[code.index("def call") :]
    assert called.count("mq_ao.int8_conv_step_.default(") == tiny.config.n_layer
    assert called.count("mq_ao.int8_scan_step_.default(") == tiny.config.n_layer
    # Kernels of Inductor's own: embedding, and the residual's last sum. None of them copies states.
    assert called.count("cpp_fused") <= 2, called


def test_states_that_a_later_step_overwrote_are_refused(tiny: MambaLM) -> None:
    program = compile_float(tiny, "cuda")
    ids = tokens(2, 5)
    _, *start = program.prefill(ids)
    first, *one = program.decode(ids[:, :1], *start)
    kept = [state.clone() for state in one]
    second, *_ = program.decode(ids[:, 1:2], *one)
    with pytest.raises(MqAoError, match="a later one has overwritten them, or they are a part of others"):
        program.decode(ids[:, 1:2], *one)
    again, *_ = program.decode(ids[:, 1:2], *kept)
    assert torch.equal(again, second)
    assert torch.equal(program.decode(ids[:, :1], *start)[0], first)
    # Another batch size has states of its own, and both go on.
    other, *_ = program.decode(ids[:1, :1], *(state[:, :1] for state in start))
    torch.testing.assert_close(other, first[:1], rtol=1e-5, atol=1e-5)
    # Prefill goes on from states too, and parts of them are made tensors before they are looked at.
    for stale in (one, [state[:, :1] for state in one]):
        with pytest.raises(MqAoError, match="a later one has overwritten them"):
            program.prefill(ids[: stale[0].shape[1]], *stale)


def test_sequences_of_one_batch_size_take_turns(tiny: MambaLM) -> None:
    program = compile_float(tiny, "cuda")
    prompts = [tokens(1, 6, seed=seed) for seed in range(2)]
    expected = [program.generate(prompt, 8) for prompt in prompts]
    streams = [program.stream(prompt, 8) for prompt in prompts]
    turns = list(zip(*streams, strict=True))
    for got, wanted in zip(zip(*turns, strict=True), expected, strict=True):
        assert torch.equal(torch.stack([token.flatten()[0] for token in got]), wanted[0, 6:])
    # The states of the one that had to go are as they were, and nobody else's.
    _, *first = program.decode(prompts[0][:, :1], *program.prefill(prompts[0])[1:])
    kept = [state.clone() for state in first]
    program.decode(prompts[1][:, :1], *program.prefill(prompts[1])[1:])
    for state, wanted in zip(first, kept, strict=True):
        assert torch.equal(state, wanted)
    again, *_ = program.decode(prompts[0][:, 1:2], *first)
    assert torch.equal(again, program.decode(prompts[0][:, 1:2], *kept)[0])


def test_a_refused_step_changes_nothing(tiny: MambaLM) -> None:
    program = compile_float(tiny, "cuda")
    ids = tokens(2, 5)
    _, *start = program.prefill(ids)
    _, *one = program.decode(ids[:, :1], *start)
    _, *two = program.decode(ids[:, 1:2], *one)
    kept = [state.clone() for state in two]
    _, *single = program.prefill(ids[:1])
    for states, message in (((start[0], one[1]), "a later one has overwritten them"), (single, "of a batch of 1, and")):
        with pytest.raises(MqAoError, match=message):
            program.decode(ids[:, :1], *states)
        for state, wanted in zip(two, kept, strict=True):
            assert torch.equal(state, wanted)
    # Nor does one that is the first of its batch size.
    with pytest.raises(MqAoError, match="of a batch of 1, and input_ids of a batch of 3"):
        program.decode(tokens(3, 1), *single)
    program.decode(tokens(3, 1), *program.prefill(tokens(3, 5))[1:])


def test_memory_is_made_once_and_outlives_inference_mode(tiny: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compile_float(tiny, "cuda")
    ids, marked = tokens(2, 5), []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", marked.append)
    with torch.inference_mode():
        _, *states = program.prefill(ids)
        _, *states = program.decode(ids[:, :1], *states)
    expected, *_ = program.prefill(ids[:, 1:3], *states)
    for token in ids[:, 1:3].split(1, dim=1):
        logits, *states = program.decode(token, *states)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(marked) == len(states)
