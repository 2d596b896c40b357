"""Linear layers whose weight depends on the row: kernels against their references, and those against single linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mq_ao.errors import MqAoError
from mq_ao.ops.expert_linear import expert_linear, expert_linear_packed, expert_linear_packed_per_token
from mq_ao.ops.linear_packed import linear_packed
from mq_ao.ops.packing import group_count, linear_prepack
from tests.conftest import assert_same_bits_for_any_threads

pytestmark = pytest.mark.usefixtures("native_kernels")
ops = torch.ops.mq_ao
drawn = settings(max_examples=100, deadline=None)


@dataclass(frozen=True)
class Case:
    """A drawn call: how many rows each expert has, the layer's shape, and how its weights are packed."""

    counts: tuple[int, ...]
    n: int
    k: int
    bits: int
    group_size: int
    long: bool
    seed: int

    def ends(self) -> Tensor:
        return torch.tensor(self.counts).cumsum(0).to(torch.int64 if self.long else torch.int32)

    def weight(self) -> Tensor:
        """int8 (E, N, K)."""
        top = 2 ** (self.bits - 1)
        shape = (len(self.counts), self.n, self.k)
        return torch.randint(-top, top, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(self.seed))

    def integers(self) -> dict[str, Any]:
        """Arguments that both integer operators share."""
        gen = torch.Generator().manual_seed(self.seed)
        groups = (group_count(self.k, self.group_size),) if self.group_size else ()
        packed = [linear_prepack(each, self.bits, self.group_size) for each in self.weight()]
        scale = torch.rand((len(self.counts), *groups, self.n), generator=gen)
        layout = {"bits": self.bits, "group_size": self.group_size}
        return {"packed": torch.stack(packed), "weight_scale": scale, "ends": self.ends(), **layout}

    def rows(self) -> Tensor:
        gen = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(0, 256, (sum(self.counts), self.k), dtype=torch.uint8, generator=gen)


cases = st.builds(
    Case,
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 8, 13, 33]), min_size=1, max_size=6).map(tuple),
    n=st.sampled_from([1, 7, 16, 64, 96, 130]),
    k=st.sampled_from([1, 5, 32, 48, 130]),
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([0, 4, 32]),
    long=st.booleans(),
    seed=st.integers(0, 2**31),
)


@drawn
@given(case=cases)
def test_kernels_give_the_bits_of_their_references(case: Case) -> None:
    shared, x = case.integers(), case.rows()
    static = {"x": x, "x_scale": 0.03, "x_zero_point": 120, **shared}
    assert torch.equal(ops.expert_linear_packed(**static), expert_linear_packed.reference(**static))
    tokens = {"q": x, "scale": torch.rand(len(x), 1, generator=torch.Generator().manual_seed(case.seed)), **shared}
    kernel, reference = ops.expert_linear_packed_per_token, expert_linear_packed_per_token.reference
    assert torch.equal(kernel(**tokens), reference(**tokens))


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_each_expert_is_a_linear(case: Case) -> None:
    shared, x = case.integers(), case.rows()
    y = ops.expert_linear_packed(x, 0.03, 120, **shared)
    begin = 0
    for expert, count in enumerate(case.counts):
        scale = shared["weight_scale"][expert]
        given = (x[begin : begin + count], 0.03, 120, shared["packed"][expert], scale.t() if case.group_size else scale)
        expected = linear_packed.reference(*given, bits=case.bits, group_size=case.group_size)
        assert torch.equal(y[begin : begin + count], expected)
        begin += count


@settings(max_examples=50, deadline=None)
@given(case=cases, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), cut=st.booleans())
def test_floats(case: Case, dtype: torch.dtype, cut: bool) -> None:
    gen = torch.Generator().manual_seed(case.seed)
    wide = torch.randn(sum(case.counts), case.k + 3 * cut, generator=gen).to(dtype)
    x, weight = wide[:, : case.k], torch.randn(len(case.counts) * case.n, case.k, generator=gen).to(dtype)
    y = ops.expert_linear(x, weight, case.ends())
    assert y.dtype == dtype and y.is_contiguous()
    exact = expert_linear.reference(x.double(), weight.double(), case.ends())
    size = expert_linear.reference(x.double().abs(), weight.double().abs(), case.ends())
    # Sums of k products, and a result, each rounded to the dtype at the coarsest.
    assert ((y.double() - exact).abs() <= (case.k + 1) * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 2)])
def test_gradients(counts: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, generator=gen, requires_grad=True)
    weight = torch.randn(len(counts) * 3, 4, dtype=torch.float64, generator=gen, requires_grad=True)
    ends = torch.tensor(counts).cumsum(0)
    assert torch.autograd.gradcheck(lambda x, weight: ops.expert_linear(x, weight, ends), (x, weight))


@pytest.mark.parametrize(
    "counts", [(40, 0, 1, 70), (300,), (7,) * 60, (1, 0) * 40, (200, 1, 1, 1, 1)], ids=lambda counts: str(len(counts))
)
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 32)])
def test_results_do_not_depend_on_threads(counts: tuple[int, ...], bits: int, group_size: int) -> None:
    case = Case(counts, 200, 256, bits, group_size, long=False, seed=1)
    shared, x = case.integers(), case.rows()
    scale = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(1))
    assert_same_bits_for_any_threads(
        lambda: [
            ops.expert_linear_packed(x, 0.1, 3, **shared),
            ops.expert_linear_packed_per_token(x, scale, **shared),
        ]
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_rows_stay_a_symbol(per_token: bool) -> None:
    case = Case((2, 3), 8, 16, 8, 0, long=False, seed=2)
    shared = case.integers()

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            weight = (shared["packed"], shared["weight_scale"], ends)
            if per_token:
                return ops.expert_linear_packed_per_token(x, torch.ones_like(x[:, :1], dtype=torch.float), *weight)
            return ops.expert_linear_packed(x, 0.1, 3, *weight)

    example = (case.rows(), case.ends())
    program = torch.export.export(Module(), example, dynamic_shapes=({0: torch.export.Dim("rows", min=1)}, None))
    other = Case((7, 0), 8, 16, 8, 0, long=False, seed=3)
    args = (other.rows(), other.ends())
    assert torch.equal(program.module()(*args), Module()(*args))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, 16)}, "takes uint8 activations, not torch.float32"),
        ({"x": torch.zeros(5, dtype=torch.uint8)}, r"rows of experts are \(rows, inputs\), not \(5,\)"),
        ({"x_zero_point": 256}, "a uint8 zero point lies in 0..255"),
        ({"ends": torch.tensor([2.0, 5.0])}, "ends must be int32 or int64"),
        ({"ends": torch.tensor([2, 5], dtype=torch.uint8)}, "ends must be int32 or int64"),
        ({"ends": torch.tensor([5])}, r"weight_scale must be contiguous float32 \(1, outputs\)"),
        ({"packed": torch.zeros(2, 8, dtype=torch.int8)}, "are contiguous int8 .*: stack what linear_prepack gives"),
        ({"weight_scale": torch.ones(8)}, "weight_scale must be contiguous float32"),
        ({"bits": 3}, "have 8 or 4 bits, not 3"),
        ({"group_size": 6, "weight_scale": torch.ones(2, 3, 8)}, "group_size must be a multiple of 4"),
    ],
)
def test_bad_operands(changes: dict[str, Any], message: str) -> None:
    case = Case((2, 3), 8, 16, 8, 0, long=False, seed=4)
    given = {"x": case.rows(), "x_scale": 0.1, "x_zero_point": 3, **case.integers(), **changes}
    with pytest.raises(MqAoError, match=message):
        ops.expert_linear_packed(**given)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(MqAoError, match=message):
        ops.expert_linear_packed(**given)


@pytest.mark.parametrize("ends", [[3, 2], [-1, 5], [2, 4], [2, 6]])
def test_ends_that_are_none(ends: list[int]) -> None:
    case = Case((2, 3), 8, 16, 8, 0, long=False, seed=5)
    shared = {**case.integers(), "ends": torch.tensor(ends)}
    with pytest.raises(MqAoError, match="ends must rise from 0 or more to the 5 rows"):
        ops.expert_linear_packed(case.rows(), 0.1, 3, **shared)
    with pytest.raises(MqAoError, match="ends must rise"):
        ops.expert_linear(torch.zeros(5, 4), torch.zeros(6, 4), torch.tensor(ends))
    with pytest.raises(MqAoError, match="ends must rise"):
        ops.expert_linear_packed_per_token(case.rows(), torch.ones(5, 1), **shared)


def test_bad_floats() -> None:
    with pytest.raises(MqAoError, match=r"the weight of 2 experts must be torch.float32 \(2 \* outputs, 4\)"):
        ops.expert_linear(torch.zeros(5, 4), torch.zeros(5, 4), torch.tensor([2, 5]))
    with pytest.raises(MqAoError, match=r"one value for each row, \(5, 1\)"):
        case = Case((2, 3), 8, 16, 8, 0, long=False, seed=6)
        ops.expert_linear_packed_per_token(case.rows(), torch.ones(5), **case.integers())
