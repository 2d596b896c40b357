"""Programs that are called wrongly say so, on every backend: nothing is read that was not checked."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao import MqAoError
from mq_ao.lowering.executorch import ExecutorchProgram, Options
from mq_ao.lowering.inductor import InductorProgram
from mq_ao.lowering.stateful_program import StatefulProgram
from mq_ao.models import Mamba2Config, Mamba2LM, MambaConfig, MambaLM

VOCAB = 24
HAVE_EXECUTORCH = importlib.util.find_spec("executorch") is not None
BACKENDS = ["inductor", "cuda", *(["executorch"] if HAVE_EXECUTORCH else [])]
# An activation on the border between two integers may fall to either side when the same tokens run in other pieces.
FLIPPED_STEPS = 2e-2
Call = Callable[[Any], tuple[Tensor, Any, Any]]


def model() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=VOCAB, d_model=32, n_layer=1, d_state=4)).eval()


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def program(backend: str) -> Any:
    """One program a backend, made once."""
    quantized = mq_ao.quantize(model(), [ids_of(2, 32, seed=seed) for seed in (1, 2)], "rtn-w8a8", backend=backend)
    return quantized.lower(options=Options(max_length=16) if backend == "executorch" else None)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(params=BACKENDS)
def any_program(request: pytest.FixtureRequest) -> Any:
    return program(request.param)


@pytest.fixture(params=["inductor", "cuda"])
def stateful(request: pytest.FixtureRequest) -> StatefulProgram:
    made = program(request.param)
    assert isinstance(made, StatefulProgram)
    return made


def test_states_of_another_batch_are_refused_with_both_batches(stateful: StatefulProgram) -> None:
    _, conv, ssm = stateful.prefill(ids_of(3, 5))
    for call in (stateful, stateful.prefill, stateful.decode):
        with pytest.raises(MqAoError, match="conv_state is of a batch of 3, and input_ids of a batch of 2"):
            call(ids_of(2, 1), conv, ssm)
        with pytest.raises(MqAoError, match="ssm_state is of a batch of 3, and input_ids of a batch of 65536"):
            call(ids_of(65536, 1), conv.repeat(1, 65536, 1, 1)[:, :65536], ssm)


def test_states_in_another_order_or_missing_are_refused(stateful: StatefulProgram) -> None:
    _, conv, ssm = stateful.prefill(ids_of(2, 5))
    for call in (stateful, stateful.prefill, stateful.decode):
        with pytest.raises(MqAoError, match="conv_state before ssm_state"):
            call(ids_of(2, 1), ssm, conv)
        with pytest.raises(MqAoError, match="ssm_state is missing"):
            call(ids_of(2, 1), conv, None)
        with pytest.raises(MqAoError, match="conv_state is missing"):
            call(ids_of(2, 1), None, ssm)
        with pytest.raises(MqAoError, match="conv_state is no tensor of values but a list"):
            call(ids_of(2, 1), [conv], ssm)
        with pytest.raises(MqAoError, match="conv_state is no tensor of values"):
            call(ids_of(2, 1), conv.to("meta"), ssm)
    with pytest.raises(MqAoError, match="conv_state is missing"):
        stateful.decode(ids_of(2, 1), None, None)


def test_decode_takes_one_token(any_program: Any) -> None:
    _, conv, ssm = any_program.prefill(ids_of(1, 5))
    with pytest.raises(MqAoError, match=r"decode takes one token a sequence, and input_ids of shape \(1, 2\) holds 2"):
        any_program.decode(ids_of(1, 2), conv, ssm)
    with pytest.raises(MqAoError, match="missing"):
        any_program.decode(ids_of(1, 1), None, None)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[VOCAB]]), f"holds {VOCAB}..{VOCAB}, outside the vocabulary of {VOCAB} tokens"),
        (torch.tensor([[-1]], dtype=torch.int8), "holds -1..-1, outside"),
        (torch.tensor([[2**63]], dtype=torch.uint64), "outside the vocabulary"),
        (torch.tensor([[True]]), "or other integers; got a tensor of shape .1, 1., torch.bool"),
        (torch.tensor([[1.0]]), "must be .batch, length. int64 or other integers"),
        (torch.tensor([1]), r"got a tensor of shape \(1,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), "is empty"),
        ([[]], "is empty"),
        (torch.zeros(1, 1, dtype=torch.int64).to_sparse(), "sparse"),
        (torch.zeros(1, 1, dtype=torch.int64, device="meta"), "meta"),
        ([[1, 2], [3]], "a list that is no rectangle of whole numbers"),
        ("text", "a str that is no rectangle"),
        (None, "a NoneType that is no rectangle"),
        ({"input_ids": [[1]]}, "a dict that is no rectangle"),
        ([[2**70]], "a list that is no rectangle"),
    ],
)
def test_what_is_no_token_id_is_refused_everywhere(ids: Any, message: str, any_program: Any) -> None:
    for call in (any_program, any_program.prefill, lambda value: any_program.generate(value, 1), model()):
        with pytest.raises(MqAoError, match=message):
            call(ids)
    # As a second token as well.
    _, conv, ssm = any_program.prefill(ids_of(1, 3))
    with pytest.raises(MqAoError, match=message):
        any_program.decode(ids, conv, ssm)


def as_given() -> list[tuple[str, Callable[[Tensor], Any]]]:
    """Other ways to give the same ids."""
    ways: list[tuple[str, Callable[[Tensor], Any]]] = [
        (str(dtype), lambda ids, dtype=dtype: ids.to(dtype))
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    ]
    return [
        *ways,
        ("lists", lambda ids: ids.tolist()),
        ("tuples", lambda ids: tuple(map(tuple, ids.tolist()))),
        ("tensors in a list", list),
        ("numpy", lambda ids: ids.numpy().astype(numpy.int32)),
        ("numpy, backwards", lambda ids: ids.numpy()[:, ::-1].copy()[:, ::-1]),
        ("not contiguous", lambda ids: ids.t().contiguous().t()),
    ]


@pytest.mark.parametrize(("way", "give"), as_given(), ids=[name for name, _ in as_given()])
def test_ids_in_another_form_give_the_same_logits(way: str, give: Callable[[Tensor], Any], any_program: Any) -> None:
    ids = ids_of(1, 7, seed=3)
    whole, first = any_program(ids)[0], any_program.generate(ids[:, :4], 3)
    assert torch.equal(any_program(give(ids))[0], whole)
    assert torch.equal(any_program.generate(give(ids[:, :4]), 3), first)
    _, conv, ssm = any_program.prefill(give(ids[:, :6]))
    assert relative(any_program.decode(give(ids[:, 6:]), conv, ssm)[0][:, 0], whole[:, -1]) < FLIPPED_STEPS
    eager = model()
    with torch.no_grad():
        assert torch.equal(eager(give(ids))[0], eager(ids)[0])


def test_states_may_be_slices_inference_tensors_or_have_a_history(stateful: StatefulProgram) -> None:
    ids = ids_of(2, 6)
    _, conv, ssm = (value.clone() for value in stateful.prefill(ids))
    expected = stateful.decode(ids[:, :1], conv.clone(), ssm.clone())[0].clone()
    with torch.inference_mode():
        inside = [state.clone() for state in (conv, ssm)]
        assert torch.equal(stateful.decode(ids[:, :1], *inside)[0], expected)
    for states in (
        inside,
        [state.clone().requires_grad_() for state in (conv, ssm)],
        [state.transpose(0, 1).contiguous().transpose(0, 1) for state in (conv, ssm)],
        [torch.cat([state, state], 1)[:, 2:] for state in (conv, ssm)],
    ):
        got = stateful.decode(ids[:, :1], *states)[0]
        assert torch.equal(got, expected) and not got.requires_grad


def test_a_mask_is_refused(any_program: Any) -> None:
    mask = torch.ones(1, 3, dtype=torch.int64)
    for call in (any_program, any_program.prefill, model()):
        with pytest.raises(MqAoError, match="takes no attention_mask: padding would change its states"):
            call(ids_of(1, 3), attention_mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_takes_the_mask_of_a_prompt(backend: str) -> None:
    run, ids = program(backend), ids_of(1, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    if backend == "executorch":
        for call in (run.generate, run.stream):
            with pytest.raises(MqAoError, match="keeps the state of one batch, whose sequences have one length"):
                call(ids, 3, attention_mask=mask)
        return
    assert torch.equal(run.generate(ids, 3, attention_mask=mask)[:, -3:], run.generate(ids[:, 2:], 3)[:, -3:])


def test_the_model_itself_checks_states() -> None:
    eager = model()
    _, conv, ssm = eager(ids_of(3, 2))
    for states, message in (
        ((conv, ssm), "conv_state is of a batch of 3, and input_ids of a batch of 2"),
        ((ssm, conv), "conv_state before ssm_state"),
        ((conv[:, 1:], None), "ssm_state is missing"),
        ((conv[:, 1:].double(), ssm[:, 1:]), "conv_state is torch.float64"),
    ):
        with pytest.raises(MqAoError, match=message):
            eager(ids_of(2, 2), *states)


def mamba2() -> MambaLM:
    torch.manual_seed(0)
    return Mamba2LM(
        Mamba2Config(vocab_size=VOCAB, d_model=32, n_layer=2, d_state=8, headdim=16, tie_embeddings=True)
    ).eval()


@functools.cache
def mamba2_program() -> InductorProgram:
    torch.manual_seed(0)
    made = Mamba2LM(Mamba2Config(vocab_size=VOCAB, d_model=32, n_layer=1, d_state=8, headdim=16)).eval()
    lowered = mq_ao.quantize(made, [ids_of(2, 32, seed=seed) for seed in (1, 2)], "rtn-w8a8").lower("inductor")
    assert isinstance(lowered, InductorProgram)
    return lowered


@pytest.mark.parametrize("make", [lambda: program("inductor"), mamba2_program], ids=["mamba", "mamba2"])
@pytest.mark.parametrize("length", [96, 97, 127, 128, 129, 191, 192, 193, 640])
def test_pieces_give_the_bits_of_the_whole(
    make: Callable[[], InductorProgram], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ids = make(), ids_of(2, length, seed=length)
    results = []
    for tokens in (128, 10**6):  # 64 tokens of each sequence at once, or all
        monkeypatch.setattr(made, "_piece_tokens", tokens)
        sizes = [piece.shape[1] for piece in made._pieces(ids)]
        assert sum(sizes) == length and (len(sizes) == 1 or min(sizes) > 32)
        assert (len(sizes) > 1) is (tokens == 128 and length > 96)
        results.append([*made(ids), *made.prefill(ids)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# What a caller may do wrong, all at once. Most draws are wrong in one way or another; those that are not must be right.
DTYPES = [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool]
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "as they came": lambda state: state,
    "one sequence more": lambda state: torch.cat([state, state[:, :1]], 1),
    "one sequence less": lambda state: state[:, 1:],
    "one axis less": lambda state: state[0],
    "double": lambda state: state.double(),
    "int8": lambda state: state.to(torch.int8),
    "transposed": lambda state: state.transpose(-1, -2),
    "missing": lambda state: None,
    "a layer more": lambda state: torch.cat([state, state]),
}
# Changes after which they are the states of these sequences.
SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they came": lambda prompt: prompt,
    "one sequence more": lambda prompt: torch.cat([prompt, prompt[:1]]),
    "one sequence less": lambda prompt: prompt[1:],
}


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call: how many sequences and tokens before it, and what it is given."""
    return {
        "method": draw(st.sampled_from(["__call__", "prefill", "decode"])),
        "before": draw(st.integers(1, 3)),
        "batch": draw(st.integers(0, 3)),
        "length": draw(st.sampled_from([0, 1, 1, 1, 2, 5, 20])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "rank": draw(st.sampled_from([2, 2, 2, 1, 3])),
        "beyond": draw(st.sampled_from([0, 0, 0, 1, -100])),
        "states": draw(st.sampled_from([["conv", "ssm"]] * 3 + [["ssm", "conv"], ["conv", "conv"], []])),
        "changes": draw(st.lists(st.sampled_from(["as they came"] * 6 + list(CHANGES)), min_size=2, max_size=2)),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_any_call_is_refused_or_right(backend: str, call: dict[str, Any]) -> None:
    made = program(backend)
    kept = isinstance(made, ExecutorchProgram)  # states are tokens that stand for what the program keeps
    before, batch, length = (1 if kept else call["before"]), call["batch"], call["length"]
    prompt, ids = ids_of(before, 3, seed=call["seed"]), ids_of(batch, length, seed=call["seed"] + 1)
    _, conv, ssm = made.prefill(prompt)
    named = {"conv": conv, "ssm": ssm}
    states = [named[name] for name in call["states"]]
    if not kept:
        states = [CHANGES[change](state) for change, state in zip(call["changes"], states, strict=False)]
    given_ids: Any = ids.to(call["dtype"])
    if ids.numel():
        given_ids[0, 0] = given_ids[0, 0] if not call["beyond"] else VOCAB - 1 + call["beyond"]
    given_ids = given_ids.reshape({1: (-1,), 2: given_ids.shape, 3: (1, *given_ids.shape)}[call["rank"]])
    args = [given_ids, *states]
    if call["method"] == "decode":
        args += [None] * (3 - len(args))

    fresh = all(state is None for state in states)
    first, second = call["changes"] if not kept else ["as they came"] * 2
    sequences = SEQUENCES[first](prompt) if first == second and first in SEQUENCES else None
    fits = kept or (call["states"] == ["conv", "ssm"] and sequences is not None and len(sequences) == batch)
    right = (
        call["rank"] == 2
        and call["dtype"] in (torch.int64, torch.int32, torch.uint8)
        and (not call["beyond"] or 0 <= int(given_ids[0, 0] if ids.numel() else 0) < VOCAB)
        and min(batch, length) > 0
        and (not kept or batch == 1)
        and (call["method"] != "decode" or (length == 1 and not fresh))
        and (fresh or fits)
    )
    try:
        logits = getattr(made, call["method"])(*args)[0]
    except MqAoError:
        assert not right
        return
    assert right
    whole = ids if fresh or sequences is None else torch.cat([sequences, ids], 1)
    expected = made(whole)[0][:, -length:]
    if call["method"] != "__call__":
        expected = expected[:, -1:]
    assert logits.shape == expected.shape
    assert relative(logits, expected) < FLIPPED_STEPS
