"""Generation: the ways to choose a token, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mq_ao
from mq_ao.api import compile_float
from mq_ao.errors import MqAoError
from mq_ao.models import MambaConfig, MambaLM, Sampling, generate, stream


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=40, d_model=16, n_layer=2, d_state=4)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)  # far from uniform, far from certain
    return model


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_equals_the_argmax_of_the_whole_sequence(model: MambaLM) -> None:
    result = model.generate(PROMPT, 12)
    assert result.shape == (2, 15) and torch.equal(result[:, :3], PROMPT)
    with torch.no_grad():
        logits, _, _ = model(result[:, :-1])
    assert torch.equal(logits[:, 2:].argmax(-1), result[:, 3:])


def test_seed_decides_the_draw(model: MambaLM) -> None:
    def draw(seed: int | None) -> Tensor:
        return generate(model, PROMPT, 20, Sampling(temperature=1.0, seed=seed))

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)  # the global generator plays no part
    assert torch.equal(draw(7), first)
    assert not torch.equal(draw(8), first)
    assert not torch.equal(draw(None), draw(None))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.8, top_k=1), Sampling(temperature=1.0, top_p=1e-6), Sampling(temperature=1e-4)],
    ids=["top_k", "top_p", "cold"],
)
def test_narrowest_choice_is_greedy(model: MambaLM, sampling: Sampling) -> None:
    assert torch.equal(generate(model, PROMPT, 15, sampling), generate(model, PROMPT, 15))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
)
def test_choice_stays_inside_top_k_and_top_p(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=generator) * 3
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    probability = (logits[0] / temperature).softmax(0)
    order = probability.argsort(descending=True)[: top_k or None]
    kept = probability[order] / probability[order].sum()
    # 1e-5: where the sum meets top_p to a rounding, either side may count.
    allowed = order[(kept.cumsum(0) - kept) < top_p + 1e-5].tolist()
    drawn = {int(sampling.choose(logits, generator)) for _ in range(30)}
    assert drawn <= set(allowed)


def test_draws_follow_the_probabilities() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probability.log().expand(20_000, 4)
    drawn = Sampling(temperature=1.0).choose(logits, torch.Generator().manual_seed(0))
    # The standard deviation of a share of 20000 draws is at most 0.0036; 0.015 is four of them.
    torch.testing.assert_close(drawn.flatten().bincount(minlength=4) / 20_000, probability, atol=0.015, rtol=0)


def test_stream_yields_one_token_at_a_time_and_runs_the_prompt_once(model: MambaLM) -> None:
    lengths: list[int] = []

    def step(ids: Tensor, *states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        lengths.append(ids.shape[1])
        return model(ids, *states)

    tokens = list(stream(step, PROMPT, 4))
    assert [tuple(token.shape) for token in tokens] == [(2, 1)] * 4
    assert lengths == [3, 1, 1, 1]
    assert torch.equal(torch.cat(tokens, 1), generate(model, PROMPT, 4)[:, 3:])


def test_no_new_tokens_gives_the_prompt(model: MambaLM) -> None:
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "empty"),
        (torch.tensor([1, 2]), r"\(batch, length\)"),
        (torch.tensor([[1.0]]), "int64"),
        (torch.tensor([[40]]), "vocabulary"),
        (torch.tensor([[-1]]), "vocabulary"),
    ],
)
def test_bad_prompts_are_refused(model: MambaLM, prompt: Tensor, word: str) -> None:
    with pytest.raises(MqAoError, match=word):
        model.generate(prompt, 3)


def test_negative_length_is_refused(model: MambaLM) -> None:
    with pytest.raises(MqAoError, match="max_new_tokens"):
        model.generate(PROMPT, -1)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(MqAoError, match=next(iter(options))):
        Sampling(**options)


def padded_model(known_tokens: int | None = None) -> MambaLM:
    """A vocabulary of 40 of which a tokenizer knows 5; the others are the likeliest everywhere."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 1, "d_state": 4}
    model = MambaLM(MambaConfig(**sizes, tie_embeddings=False, known_tokens=known_tokens)).eval()
    with torch.no_grad():
        model.lm_head.weight[5:] *= 100
    return model


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0), Sampling(temperature=2.0, top_k=20), Sampling(temperature=1.0, top_p=0.9)],
)
def test_tokens_that_a_tokenizer_does_not_know_are_never_chosen(sampling: Sampling) -> None:
    model = padded_model()
    assert generate(model, PROMPT, 20, sampling)[:, 3:].max() >= 5  # or it would prove nothing
    for bound in (sampling.within(5), sampling.within(7).within(5), sampling.within(5).within(7).within(None)):
        result = generate(model, PROMPT, 20, bound)[:, 3:]
        assert result.max() < 5
    assert len(result.unique()) > 1 or sampling.temperature == 0
    assert sampling.within(None) is sampling
    with pytest.raises(MqAoError, match="known_tokens is 0: it is a whole number of at least 1"):
        sampling.within(0)


def test_a_bound_beyond_the_vocabulary_changes_nothing(model: MambaLM) -> None:
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        assert torch.equal(generate(model, PROMPT, 9, sampling.within(1000)), generate(model, PROMPT, 9, sampling))


def test_a_model_and_its_programs_keep_to_the_tokens_that_the_configuration_tells(
    tmp_path: Path,
) -> None:
    model = padded_model(known_tokens=5)
    assert model.generate(PROMPT, 20)[:, 3:].max() < 5
    program = compile_float(model, "cuda")
    program.save(tmp_path / "m.ptc")
    loaded = mq_ao.load(tmp_path / "m.ptc")
    assert loaded.info["known_tokens"] == 5 and loaded(PROMPT)[0].shape[-1] == 40
    for sampling in (None, Sampling(temperature=1.0), Sampling(known_tokens=7)):
        assert loaded.generate(PROMPT, 20, sampling)[:, 3:].max() < 5
        assert max(int(token.max()) for token in loaded.stream(PROMPT, 20, sampling)) < 5
    assert loaded.generate(PROMPT, 20, Sampling(known_tokens=2))[:, 3:].max() < 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-1, float("nan"), float("inf"), True, "1", None)),
        *(("top_k", value) for value in (-1, 1.5, True, "3")),
        *(("top_p", value) for value in (0, -0.1, 2, float("nan"), "x")),
        *(("seed", value) for value in (1.5, "a", 2**70)),
    ],
)
def test_nonsense_is_refused_where_it_is_said(option: str, value: object) -> None:
    with pytest.raises(MqAoError, match=f"^{option} is "):
        Sampling(**{option: value})  # type: ignore[arg-type]  # wrong on purpose
