"""`mq_ao::cached_attention`: the native kernel against the float64 reference, and that against PyTorch's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from mq_ao.errors import MqAoError
from mq_ao.ops.cached_attention import cached_attention
from mq_ao.ops.linear_packed import quantize_per_token
from tests.conftest import assert_same_bits_for_any_threads

pytestmark = pytest.mark.usefixtures("native_kernels")
attention = torch.ops.mq_ao.cached_attention
reference = cached_attention.reference
CACHED = ("key", "value", "past_key", "past_value")


@dataclass(frozen=True)
class Case:
    """A drawn call of the operator.

    Attributes:
        past: tokens before; -1: no cache is given.
        cut: whether the query is a slice of wider rows, and keys have rows apart.
    """

    batch: int
    groups: int
    group_heads: int
    length: int
    width: int
    past: int
    integers: bool
    padded: bool
    cut: bool
    seed: int

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments by name, floats in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        extra = 3 if self.cut else 0
        shape = (self.batch, self.length, self.groups * self.group_heads, self.width + extra)
        query = torch.randn(shape, generator=gen).to(dtype)[..., : self.width].transpose(1, 2)
        given: dict[str, Any] = {"query": query, "scaling": 2.0 * self.width**-0.5}
        for name in CACHED:
            tokens = self.past if name.startswith("past") else self.length
            if tokens < 0:
                continue
            rows = torch.randn(tokens, self.batch, self.groups + extra, self.width, generator=gen)[:, :, : self.groups]
            if self.integers:
                given[name], scale = quantize_per_token(rows)
                given[f"{name}_scale"] = scale[..., 0]
            else:
                given[name] = rows.to(dtype)
        if self.padded:
            given["starts"] = torch.randint(0, self.length + max(self.past, 0) + 1, (self.batch,), generator=gen)
        return given


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    group_heads=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17]),
    length=st.sampled_from([1, 2, 3, 7, 16, 33, 65]),
    width=st.sampled_from([1, 4, 6, 12, 16, 24, 32, 64, 80, 96, 128]),
    past=st.sampled_from([-1, 0, 1, 5, 63, 64, 65, 200]),
    integers=st.booleans(),
    padded=st.booleans(),
    cut=st.booleans(),
    seed=st.integers(0, 2**31),
)
drawn = settings(max_examples=150, deadline=None)


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {
        name: value.double()
        if isinstance(value, Tensor) and value.is_floating_point() and "scale" not in name
        else value
        for name, value in given.items()
    }


def bound(given: dict[str, Any], of_a_value: float) -> float:
    """How far a result in float32 may be off.

    A score is a sum of `width` products, each rounded, and added in some order: its error is below width + 3 roundings
    of the sum of their magnitudes (query, scaling and scale are rounded once each). So many times log2(e), it is the
    relative error of a weight, to which exp2 adds 3 roundings, the sums at most one a key, and the division 2. A result
    is off by twice that (once for the weights, once for their sum) of the largest value.

    Args:
        given: a call's arguments.
        of_a_value: roundings of a result, relative to the largest value.
    """
    sizes = {"key": 0.0, "value": 0.0}
    for name in CACHED:
        if name in given and given[name].numel():
            rows = (given[name].double() - 128 * (given[name].dtype == torch.uint8)).abs()
            rows = rows * given[f"{name}_scale"][..., None] if f"{name}_scale" in given else rows
            sizes[name.removeprefix("past_")] = max(sizes[name.removeprefix("past_")], rows.max().item())
    width, keys = given["query"].shape[-1], given["key"].shape[0] + given.get("past_key", given["key"][:0]).shape[0]
    score = given["query"].double().abs().sum(-1).max().item() * sizes["key"] * given["scaling"]
    return sizes["value"] * (2 * 2**-24 * ((width + 3) * score * 1.45 + keys + 5) + of_a_value)


@drawn
@given(case=cases)
def test_native_kernel_equals_the_reference(case: Case) -> None:
    given = case.arguments()
    result = attention(**given)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    exact = reference(**doubled(given))
    assert (result.double() - exact).abs().max().item() <= bound(given, 2**-24)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_bfloat16(case: Case) -> None:
    given = case.arguments(torch.bfloat16)
    result = attention(**given)
    assert result.dtype == torch.bfloat16
    # The result is rounded to 8 bits.
    assert (result.double() - reference(**doubled(given))).abs().max().item() <= bound(given, 2**-8)


@pytest.mark.parametrize("group_heads", [1, 4])
@pytest.mark.parametrize("past", [2047, 2048, 4097])
def test_ranges_of_many_keys(group_heads: int, past: int) -> None:
    """A few rows share out the keys."""
    case = Case(2, 2, group_heads, 1, 16, past, integers=False, padded=True, cut=False, seed=past)
    given = {**case.arguments(), "starts": torch.tensor([past - 3, 2 * 1024 + 5])}
    assert (attention(**given).double() - reference(**doubled(given))).abs().max().item() <= bound(given, 2**-24)


@pytest.mark.parametrize("group_heads", [1, 3])
@pytest.mark.parametrize("past", [0, 5])
def test_the_reference_is_pytorchs_attention(group_heads: int, past: int) -> None:
    case = Case(2, 2, group_heads, 6, 8, past, integers=False, padded=False, cut=False, seed=past)
    given = case.arguments(torch.float64)
    key, value = (torch.cat([given[f"past_{name}"], given[name]]).permute(1, 2, 0, 3) for name in ("key", "value"))
    seen = torch.arange(6 + past) <= torch.arange(past, 6 + past)[:, None]
    expected = scaled_dot_product_attention(
        given["query"], key, value, attn_mask=seen, scale=given["scaling"], enable_gqa=True
    )
    torch.testing.assert_close(reference(**given), expected.transpose(1, 2), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(case=cases, first=st.integers(1, 64))
def test_a_sequence_in_two_calls_is_one_call(case: Case, first: int) -> None:
    whole = replace(case, past=-1).arguments()
    first = min(first, case.length - 1)
    if first == 0:
        return
    expected = attention(**whole)
    names = [name for name in whole if name.startswith(("key", "value"))]
    before = {f"past_{name}": whole[name][:first] for name in names}
    now = {name: whole[name][first:] for name in names}
    result = attention(**{**whole, **now, **before, "query": whole["query"][:, :, first:]})
    assert (result - expected[:, first:]).abs().max().item() <= 2 * bound(whole, 2**-24)


def test_what_a_token_must_not_see_does_not_matter() -> None:
    given = Case(2, 2, 2, 70, 16, 3, integers=False, padded=False, cut=False, seed=1).arguments()
    given["starts"] = torch.tensor([2, 9])
    expected = attention(**given)
    assert (expected[1, :6] == 0).all(), "tokens before the start see nothing"
    later = {name: given[name].clone() for name in ("key", "value", "past_key", "past_value")}
    for name in ("key", "value"):
        later[name][40:] = 100.0
        later[f"past_{name}"][:2] = 100.0
    changed = attention(**{**given, **later})
    assert torch.equal(changed[:, :40], expected[:, :40])


@pytest.mark.parametrize(("length", "past"), [(1, 5000), (70, 10)])
def test_results_do_not_depend_on_threads(length: int, past: int) -> None:
    given = Case(1, 2, 4, length, 16, past, integers=False, padded=False, cut=False, seed=2).arguments()
    assert_same_bits_for_any_threads(lambda: attention(**given))


def test_a_nan_is_seen_by_those_that_see_its_key() -> None:
    given = Case(1, 1, 2, 5, 8, 3, integers=False, padded=False, cut=False, seed=3).arguments()
    given["key"][2] = torch.nan
    seen = attention(**given).isnan().all(-1)[0, :, 0]
    assert seen.tolist() == [False, False, True, True, True]


def test_lengths_stay_symbols() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, past: Tensor) -> Tensor:
            return attention(query, key, key, 0.5, past, past)

    given = Case(1, 2, 2, 4, 8, 3, integers=False, padded=False, cut=False, seed=4).arguments()
    length, before = torch.export.Dim("length", min=2), torch.export.Dim("before")
    program = torch.export.export(
        Module(),
        (given["query"], given["key"], given["past_key"]),
        dynamic_shapes=({2: length}, {0: length}, {0: before}),
    )
    other = Case(1, 2, 2, 9, 8, 20, integers=False, padded=False, cut=False, seed=5).arguments()
    args = (other["query"], other["key"], other["past_key"])
    assert torch.equal(program.module()(*args), Module()(*args))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 3)}, "query must have 4 dimensions, it has 2"),
        ({"query": torch.zeros(1, 3, 4, 8)}, "3 heads cannot share the keys of 2"),
        ({"query": torch.zeros(1, 4, 4, 8, dtype=torch.uint8)}, "the query must be floating point"),
        ({"key": torch.zeros(4, 1, 2, 8, dtype=torch.bfloat16)}, "keys must be torch.float32 like the query or uint8"),
        ({"key": torch.zeros(4, 1, 2, 8, dtype=torch.uint8)}, "key is uint8, so its scale must be float32"),
        ({"value": torch.zeros(3, 1, 2, 8)}, "value must be torch.float32 .4, 1, 2, 8. like the query"),
        ({"past_value": None}, "past_key and past_value come together"),
        ({"past_value": torch.zeros(3, 2, 2, 8)}, "past_value must be"),
        ({"key_scale": torch.zeros(4, 1, 2)}, "key is torch.float32, so it takes no scale"),
        ({"past_key": None, "past_value": None, "past_key_scale": torch.zeros(1)}, "past_key_scale is given without"),
        ({"starts": torch.zeros(1)}, "starts must be int64"),
        ({"starts": torch.zeros(2, dtype=torch.int64)}, "starts must be int64 .1,."),
    ],
)
def test_bad_operands(changes: dict[str, Any], message: str) -> None:
    given = Case(1, 2, 2, 4, 8, 3, integers=False, padded=False, cut=False, seed=6).arguments()
    with pytest.raises(MqAoError, match=message):
        attention(**{**given, **changes})
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(MqAoError, match=message):
        attention(**{**given, **changes})


@settings(max_examples=50, deadline=None)
@given(case=cases, room=st.integers(0, 5))
def test_a_cache_of_fixed_size_is_written_and_attended_to(case: Case, room: int) -> None:
    case = replace(case, past=max(case.past, 0), integers=False, padded=False)
    given = case.arguments()
    caches = [
        torch.cat([given[f"past_{kind}"], torch.full((case.length + room, *given[kind].shape[1:]), torch.nan)])
        for kind in ("key", "value")
    ]
    operands = (given["query"], given["key"], given["value"], given["scaling"])
    y = torch.ops.mq_ao.attention_into_cache(*operands, *caches, torch.tensor([case.past]))
    assert torch.equal(y, reference(**given))
    for kind, cache in zip(("key", "value"), caches, strict=True):
        assert torch.equal(cache[: case.past + case.length], torch.cat([given[f"past_{kind}"], given[kind]]))
        assert cache[case.past + case.length :].isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": torch.tensor([6])}, r"tokens 6\.\.8 do not fit into a cache of 8"),
        ({"position": torch.tensor([-1])}, r"tokens -1\.\.1 do not fit"),
        ({"position": torch.tensor([1.0])}, "position must be one integer"),
        ({"position": torch.tensor([1, 2])}, "position must be one integer"),
        ({"value_cache": torch.zeros(7, 1, 2, 4)}, r"value_cache must be torch.float32 \(8, 1, 2, 4\)"),
        ({"key": torch.zeros(2, 1, 2, 4)}, r"key must be torch.float32 \(3, 1, 2, 4\)"),
        ({"key": torch.zeros(3, 1, 3, 4)}, "4 heads cannot share the keys of 3"),
        ({"query": torch.zeros(4, 3, 4)}, r"the query must be floating point \(batch, heads, length, width\)"),
    ],
)
def test_caches_that_do_not_fit_are_refused(changes: dict[str, Tensor], message: str) -> None:
    given = {
        "query": torch.zeros(1, 4, 3, 4),
        "key": torch.zeros(3, 1, 2, 4),
        "value": torch.zeros(3, 1, 2, 4),
        "scaling": 1.0,
        "key_cache": torch.zeros(8, 1, 2, 4),
        "value_cache": torch.zeros(8, 1, 2, 4),
        "position": torch.zeros(1, dtype=torch.int64),
    }
    before = given["key_cache"].clone()
    with pytest.raises(MqAoError, match=message):
        torch.ops.mq_ao.attention_into_cache(**{**given, **changes})
    assert torch.equal(given["key_cache"], before), "what is refused writes nothing"
