"""The ExecuTorch lowering: what XNNPACK takes, numerics against the q/dq graph, states, bad input."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import compile_float
from mq_ao.lowering.executorch import ExecutorchProgram, Options, Scan
from mq_ao.lowering.executorch.program import open_program
from mq_ao.models import MambaConfig, MambaLM, Sampling
from mq_ao.quantized import QuantizedModel
from tests.conftest import VOCAB, tokens

pytest.importorskip("executorch", reason='needs pip install "mq-ao[executorch]"')

MAX_LENGTH = 32
# XNNPACK sums, scales and takes roots in another order than PyTorch, by some 1e-7 of a value. A value that close to the
# boundary of two integers then becomes the other one, which is one step of one activation; later layers go on from
# there. The same graph run twice in PyTorch, with the mean of the norm taken in another order, differs as much.
FLIPPED_STEPS = 2e-2
# Most tokens see no such step, or none that is left of by then: they differ by float rounding alone.
MOST_TOKENS = 2e-3
# No integers anywhere: float32 in another order, through one block.
FLOAT = 1e-5


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def of_most_tokens(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.fixture(scope="module")
def small() -> MambaLM:
    """One block: lowering takes seconds, a layer more seconds more."""
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=64, n_layer=1)).eval()


def quantize(model: MambaLM, recipe: str) -> QuantizedModel:
    return mq_ao.quantize(model, [tokens(2, 64, seed=seed) for seed in range(100, 104)], recipe, backend="executorch")


@pytest.fixture(
    scope="module",
    params=["mambaquant-w8a8", "mambaquant-static-w8a8", "rtn-w8a8", "mambaquant-w4a8", "mambaquant-w8a8 portable"],
)
def pair(request: pytest.FixtureRequest, small: MambaLM) -> tuple[QuantizedModel, ExecutorchProgram]:
    """The q/dq graph, and the program made of it."""
    return lowered(small, *request.param.split())


@pytest.fixture(scope="module")
def program(small: MambaLM) -> ExecutorchProgram:
    """The recommended recipe."""
    return lowered(small, "mambaquant-w8a8")[1]


@functools.cache
def lowered(model: MambaLM, recipe: str, scan: str = "native") -> tuple[QuantizedModel, ExecutorchProgram]:
    quantized = quantize(model, recipe)
    program = quantized.lower(options=Options(max_length=MAX_LENGTH, scan=Scan(scan)))
    assert isinstance(program, ExecutorchProgram)
    return quantized, program


def test_every_linear_is_an_integer_one_inside_a_delegate(
    pair: tuple[QuantizedModel, ExecutorchProgram],
) -> None:
    info = pair[1].info
    for method in ("prefill", "decode"):
        found = info["methods"][method]
        assert found["linears_outside"] == 0
        # in_proj in two pieces and x_proj in three; dt_proj, out_proj and the head.
        assert sum(found["integer_linears"].values()) == 8
        assert not any("quantize" in name for name in found["outside"])
    native = info["scan"] == "native"
    # Without our operators the scan and the convolution run in float, and the program says so.
    assert bool(info["simulated"]) is not native
    assert ("mq_ao::qcausal_conv1d" in pair[1].integer_kernels) is native


def test_four_bit_weights_stay_four_bits(small: MambaLM) -> None:
    eight, four = (lowered(small, f"mambaquant-{name}")[1] for name in ("w8a8", "w4a8"))
    # in_proj's two pieces, out_proj and the head.
    assert four.integer_kernels["xnnpack linear, int4 weight, int8 per token input"] == 4
    head, in_proj, out_proj = (64 * rows for rows in (VOCAB, 256, 128))
    saved = (head + in_proj + out_proj) / 2
    # A scale for every 64 weights, and descriptions of more tensors.
    assert eight.weight_bytes - four.weight_bytes > 0.7 * saved


def test_prefill_decode_and_reset_equal_the_simulation(
    pair: tuple[QuantizedModel, ExecutorchProgram], small: MambaLM
) -> None:
    quantized, program = pair
    ids = tokens(1, 80, seed=7)
    with torch.no_grad():
        expected = quantized.converted(ids, *small.initial_states(1))[0]
    runs = []
    for _ in range(2):  # the second starts from a reset
        first, state, _ = program.prefill(ids[:, :16])
        logits = [first]
        for index in range(16, 80):
            step, state, _ = program.decode(ids[:, index : index + 1], state)
            logits.append(step)
        runs.append(torch.cat(logits, dim=1))
    assert torch.equal(*runs)
    assert relative(runs[0], expected[:, 15:]) < FLIPPED_STEPS
    assert of_most_tokens(runs[0], expected[:, 15:]) < MOST_TOKENS
    sure = expected[:, 15:].topk(2).values
    decided = sure[..., 0] - sure[..., 1] > 4 * (runs[0] - expected[:, 15:]).abs().max()
    assert decided.any()
    assert torch.equal(runs[0].argmax(-1)[decided], expected[:, 15:].argmax(-1)[decided])


def test_float_program_equals_the_model(small: MambaLM) -> None:
    program = compile_float(small, "executorch", Options(max_length=MAX_LENGTH))
    ids = tokens(1, 70)
    assert relative(program(ids)[0], small(ids)[0].detach()) < FLOAT
    assert dict(program.integer_kernels) == {}
    assert program.info["methods"]["prefill"]["linears_outside"] == 0


@pytest.mark.parametrize("length", [1, 2, 31, MAX_LENGTH, MAX_LENGTH + 1, 3 * MAX_LENGTH + 5])
def test_a_prompt_of_any_length_equals_its_tokens_one_by_one(program: ExecutorchProgram, length: int) -> None:
    ids = tokens(1, length, seed=length)
    whole, state, _ = program(ids)
    assert whole.shape == (1, length, VOCAB)
    after, _, _ = program.decode(ids[:, -1:], state)
    last, _, _ = program.prefill(ids)
    assert torch.equal(last[:, 0], whole[:, -1]) or relative(last[:, 0], whole[:, -1]) < FLIPPED_STEPS
    logits, state, _ = program.prefill(ids[:, :1])
    for index in range(1, length):
        logits, state, _ = program.decode(ids[:, index : index + 1], state)
    assert relative(logits[:, 0], whole[:, -1]) < FLIPPED_STEPS
    again, _, _ = program.decode(ids[:, -1:], state)
    assert relative(again, after) < FLIPPED_STEPS


def test_prefill_of_one_token_at_a_time(small: MambaLM, program: ExecutorchProgram) -> None:
    single = quantize(small, "mambaquant-w8a8").lower(options=Options(max_length=1))
    ids = tokens(1, 5)
    assert relative(single(ids)[0], program(ids)[0]) < FLIPPED_STEPS


def test_batches_are_independent_sequences(small: MambaLM, program: ExecutorchProgram) -> None:
    two = quantize(small, "mambaquant-w8a8").lower(options=Options(batch=2, max_length=MAX_LENGTH))
    ids = tokens(2, 9)
    both = two(ids)[0]
    for row in range(2):
        assert relative(both[row : row + 1], program(ids[row : row + 1])[0]) < FLIPPED_STEPS


def test_saved_and_loaded_it_generates_the_same(program: ExecutorchProgram, tmp_path: Path) -> None:
    program.save(tmp_path / "small.pte")
    loaded = mq_ao.load(tmp_path / "small.pte")
    prompt = tokens(1, 5)
    greedy = program.generate(prompt, max_new_tokens=12)
    assert greedy.shape == (1, 17)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=12), greedy)
    # Another prompt between does not leave a trace.
    loaded.generate(tokens(1, 7, seed=3), max_new_tokens=3)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=12), greedy)
    drawn = [loaded.generate(prompt, 12, Sampling(temperature=1.0, seed=1)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_metadata_are_methods(program: ExecutorchProgram, tmp_path: Path) -> None:
    program.save(tmp_path / "small.pte")
    opened, info = open_program(tmp_path / "small.pte")
    assert opened.load_method("get_vocab_size").execute([]) == [VOCAB]
    assert opened.load_method("get_max_seq_len").execute([]) == [MAX_LENGTH]
    assert info["recipe"] == "mambaquant-w8a8"
    assert [item["sizes"] for item in info["states"]] == [[1, 3, 128], [1, 128, 16]]
    assert set(info) >= {"torch", "executorch", "batch", "integer_kernels"}


def test_only_the_last_state_can_be_gone_on_from(program: ExecutorchProgram) -> None:
    _, state, _ = program.prefill(tokens(1, 4))
    program.decode(tokens(1, 1), state)
    with pytest.raises(MqAoError, match="keeps the state of its last call alone"):
        program.decode(tokens(1, 1), state)
    _, state, _ = program.prefill(tokens(1, 4))
    program.reset()
    with pytest.raises(MqAoError, match="keeps the state of its last call alone"):
        program.decode(tokens(1, 1), state)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (tokens(2, 4), "made for a batch of 1, not 2"),
        (tokens(1, 4).float(), r"must be \(batch, length\) int64"),
        (tokens(1, 0), "input_ids is empty"),
        (torch.tensor([[VOCAB]]), "outside the vocabulary of 256"),
    ],
)
def test_bad_input_is_refused(program: ExecutorchProgram, ids: Tensor, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        program.prefill(ids)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    from executorch.exir import to_edge

    with pytest.raises(MqAoError, match="there is no file"):
        mq_ao.load(tmp_path / "none.pte")
    (tmp_path / "garbage.pte").write_bytes(b"garbage" * 100)
    with pytest.raises(MqAoError, match="is not a program that mq_ao made"):
        mq_ao.load(tmp_path / "garbage.pte")
    foreign = to_edge(torch.export.export(nn.ReLU(), (torch.ones(3),))).to_executorch()
    (tmp_path / "foreign.pte").write_bytes(foreign.buffer)
    with pytest.raises(MqAoError, match="is not a program that mq_ao made"):
        mq_ao.load(tmp_path / "foreign.pte")


def test_missing_native_operators_are_named_with_the_command(
    program: ExecutorchProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mq_ao.ops.native import executorch_build

    def fail() -> str:
        raise MqAoError("no C++ compiler found: install g++.")

    program.save(tmp_path / "small.pte")
    monkeypatch.setattr(executorch_build, "load", fail)
    with pytest.raises(MqAoError, match="mq-ao build-kernels --executorch"):
        mq_ao.load(tmp_path / "small.pte")


def test_a_graph_of_another_backend_is_refused(small: MambaLM) -> None:
    quantized = mq_ao.quantize(small, [tokens(2, 16)], "rtn-w8a8", backend="inductor")
    with pytest.raises(MqAoError, match="quantized for inductor, whose integers are not those of executorch"):
        quantized.lower("executorch")
    with pytest.raises(MqAoError, match="backend 'inductor' takes no options"):
        quantized.lower(options=Options())
    quantized = mq_ao.quantize(small, [tokens(2, 16)], "rtn-w8a8", backend="executorch")
    with pytest.raises(MqAoError, match="the options of backend 'executorch' are mq_ao.lowering.executorch.Options"):
        quantized.lower(options={"batch": 2})


def test_a_model_without_a_scan_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    with pytest.raises(MqAoError, match="scan"):
        mq_ao.quantize(model, [torch.randn(2, 8)], backend="executorch")


@pytest.mark.parametrize("recipe", ["rtn-w8a16", "mambaquant-paper-w8a8"])
def test_recipes_without_kernels_are_refused_before_anything_runs(small: MambaLM, recipe: str) -> None:
    with pytest.raises(MqAoError, match="backend 'executorch' has no integer kernel"):
        mq_ao.quantize(small, iter(()), recipe, backend="executorch")


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("max_length", 0)])
def test_options_are_checked(name: str, value: int) -> None:
    with pytest.raises(MqAoError, match=f"{name} is {value}: it is a whole number of at least 1"):
        Options(**{name: value})
    with pytest.raises(MqAoError, match="scan is 'fast': it is one of native, portable"):
        Options(scan="fast")  # type: ignore[arg-type]


def test_programs_with_the_same_integers_do_not_share_what_is_packed(small: MambaLM) -> None:
    # Both have the integers of one set of rewritten weights, and packed weights of their own scales.
    pairs = [lowered(small, recipe) for recipe in ("mambaquant-w8a8", "mambaquant-static-w8a8", "rtn-w8a8")]
    ids = tokens(1, 40, seed=9)
    for quantized, program in pairs:
        with torch.no_grad():
            expected = quantized.converted(ids, *small.initial_states(1))[0]
        assert of_most_tokens(program(ids)[0], expected) < MOST_TOKENS


def test_a_weight_that_is_read_under_two_scales_is_packed_twice(small: MambaLM) -> None:
    graph = executorch_build_module().rewrite(quantize(small, "mambaquant-static-w8a8").converted, Options())
    packs_alike = executorch_build_module()._packs_alike
    first, second = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default][1:3]
    assert packs_alike(graph)
    second.args = (second.args[0], first.args[1])  # which writes integers of another scale
    assert not packs_alike(graph)


def executorch_build_module() -> Any:
    from mq_ao.lowering.executorch import build

    return build
