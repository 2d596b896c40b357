"""Channel statistics: exact sums, streamed, the algebra of scaling and rotating them, and pooling over ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from mq_ao import MqAoError
from mq_ao.api import capture
from mq_ao.models import MambaLM
from mq_ao.statistics import ChannelStatistics, Request, Statistics, collect, shard
from mq_ao.statistics.accumulators import BINS

# Float64 sums in another order: a few thousand roundings of 1.1e-16, relative to the sum of magnitudes.
EXACT = 1e-12
# Half a bin of 1/8 octave, and rounding of a float32 logarithm near an edge.
HALF_BIN = 2 ** (1 / 16) - 1 + 1e-5


def graph_of(*functions: Callable[[Tensor], Any]) -> GraphModule:
    """A graph that applies the functions in turn; its nodes are x, node_0, node_1, ..."""
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    for index, function in enumerate(functions):
        node = graph.create_node("call_function", function, (node,), name=f"node_{index}")
    graph.output(node)
    return GraphModule(nn.Module(), graph)


def of(*batches: Tensor, covariance: bool = True, quantiles: bool = True) -> ChannelStatistics:
    """Statistics of tensors."""
    request = Request("x", covariance=covariance, quantiles=quantiles)
    return collect(graph_of(), [request], ((batch,) for batch in batches))["x"]


def assert_sums(stats: ChannelStatistics, rows: np.ndarray) -> None:
    """Compares everything but the histogram with float64 numpy."""
    magnitudes = np.abs(rows)
    low, high = stats.extremes
    assert stats.count == len(rows)
    assert np.array_equal(low, rows.min(0)) and np.array_equal(high, rows.max(0))
    assert np.array_equal(stats.maximum, magnitudes.max(0))
    assert (np.abs(stats.total.numpy() - rows.sum(0)) <= EXACT * magnitudes.sum(0)).all()
    assert np.allclose(stats.squares, (rows**2).sum(0), rtol=EXACT, atol=0)
    if stats.moments is not None:
        assert (np.abs(stats.moments.numpy() - rows.T @ rows) <= EXACT * (magnitudes.T @ magnitudes)).all()
        assert torch.equal(stats.moments, stats.moments.T)


def assert_same(stats: ChannelStatistics, other: ChannelStatistics, *, rtol: float = EXACT) -> None:
    """Compares all that both know; histograms exactly."""
    assert stats.count == other.count
    for name in ("low", "high", "total", "squares", "moments"):
        mine, theirs = getattr(stats, name), getattr(other, name)
        if mine is not None and theirs is not None:  # sums may cancel: relative to the largest
            assert torch.allclose(mine, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max())), name
    if stats.histogram is not None and other.histogram is not None:
        assert torch.equal(stats.histogram, other.histogram)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.sampled_from([1, 2, 3, 31, 700]), min_size=1, max_size=3),
    channels=st.sampled_from([1, 2, 3, 5, 16, 48, 131]),
    covariance=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_sums_are_those_of_float64(
    rows: list[int], channels: int, covariance: bool, layout: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(3, count, channels + 2, generator=generator).mul(3).add(1).to(dtype) for count in rows]
    if layout != "plain":
        batches = [x.transpose(0, 1) if layout == "transposed" else x[..., 1 : channels + 1] for x in batches]
    before = [x.clone() for x in batches]
    stats = of(*batches, covariance=covariance)
    assert stats.channels == batches[0].shape[-1]
    assert_sums(stats, np.concatenate([x.double().reshape(-1, stats.channels).numpy() for x in batches]))
    assert stats.histogram is not None and (stats.histogram.sum(1) == stats.count).all()
    assert all(map(torch.equal, batches, before))


@pytest.mark.parametrize(("rows", "channels"), [(70000, 1), (3000, 400), (3, 40000)])
def test_wide_and_narrow_values_fall_into_blocks_of_any_number_of_rows(rows: int, channels: int) -> None:
    x = torch.randn(rows, channels)
    assert_sums(of(x, covariance=channels < 1000, quantiles=False), x.double().numpy())


@pytest.mark.parametrize("covariance", [False, True])
def test_variance_beside_a_mean_a_thousand_times_as_large(covariance: bool) -> None:
    x = torch.randn(4000, 8).add(1000)
    stats = of(x, covariance=covariance)
    rows = x.double().numpy()
    # Sums of squares lose a factor (mean / deviation)^2 = 1e6 of EXACT; float32 ones would lose every digit.
    assert np.allclose(stats.variance, rows.var(0, ddof=1), rtol=1e6 * EXACT)
    assert np.allclose(stats.mean, rows.mean(0), rtol=EXACT)
    if covariance:
        assert np.allclose(stats.covariance(), np.cov(rows.T), rtol=0, atol=1e6 * EXACT)


def test_nodes_of_a_language_model(tiny: MambaLM, calibration: list[Tensor]) -> None:
    module = capture(tiny, ())
    batches = [(ids, *tiny.initial_states(ids.shape[0])) for ids in calibration]
    kinds = ("embedding", "rms_norm", "linear", "getitem", "silu")
    names = [node.name for node in module.graph.nodes if node.name.startswith(kinds)]
    found = collect(module, [Request(name, covariance=True) for name in names], iter(batches), progress=True)
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        interpreter = torch.fx.Interpreter(module, garbage_collect_values=False)
        interpreter.run(*batch)
        for node, value in interpreter.env.items():
            if node.name in values:
                values[node.name].append(value.detach().reshape(-1, value.shape[-1]))
    assert len(found) == len(names) > 20
    for name, stats in found.items():
        assert_sums(stats, torch.cat(values[name]).double().numpy())


def test_requests_for_one_node_are_united() -> None:
    request = Request("x", covariance=True) | Request("x", quantiles=True)
    assert request == Request("x", covariance=True, quantiles=True)
    stats = collect(graph_of(), [Request("x", covariance=True), Request("x")], [(torch.ones(2, 3),)])["x"]
    assert stats.moments is not None and stats.histogram is None
    with pytest.raises(MqAoError, match="different nodes"):
        Request("x") | Request("y")


def test_nothing_is_run_for_nothing_and_nothing_behind_the_last_request() -> None:
    def forbidden(_: Tensor) -> Tensor:
        raise AssertionError("was run")

    module = graph_of(torch.neg, forbidden)
    assert list(collect(module, [Request("node_0")], [(torch.ones(2, 3),)])) == ["node_0"]
    assert len(collect(module, [], [(torch.ones(2, 3),)])) == 0
    with pytest.raises(MqAoError, match="was run"):
        collect(module, [Request("node_1")], [(torch.ones(2, 3),)])


def test_values_are_freed_as_soon_as_they_are_used() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def remember(x: Tensor) -> Tensor:
        assert all(reference() is None for reference in seen), "an earlier value is still held"
        y = x + 1
        seen.append(weakref.ref(y))
        return y

    module = graph_of(remember, torch.neg, remember, torch.neg, remember)
    collect(module, [Request("node_0", True, True), Request("node_4")], ((torch.ones(2, 3),) for _ in range(3)))
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("functions", "name", "batches", "message"),
    [
        ((), "y", [torch.ones(2, 3)], "no node y"),
        ((), "x", [], "calibration is empty"),
        ((), "x", [torch.ones(2, 0, 3)], "calibration is empty"),
        ((), "x", [torch.ones(2, 3, dtype=torch.int64)], "node x has no floating-point channels"),
        ((), "x", [torch.tensor(1.0)], "node x has no floating-point channels"),
        ((lambda x: x.split(1),), "node_0", [torch.ones(2, 3)], "node node_0 in a.b has no floating-point channels"),
        ((), "x", [torch.ones(2, 3), torch.ones(2, 4)], "had 3 channels and now has 4"),
        ((torch.log,), "node_0", [torch.ones(2, 2), torch.tensor([[1.0, 0.0]])], "NaN or Inf at node node_0 in a.b"),
        ((torch.log,), "node_0", [torch.tensor([[1.0, -1.0]])], "NaN or Inf at node node_0 in a.b"),
    ],
)
def test_bad_input_is_one_sentence(functions: Any, name: str, batches: list[Tensor], message: str) -> None:
    module = graph_of(*functions)
    for node in module.graph.nodes:
        if node.name == "node_0":
            node.meta["nn_module_stack"] = {"key": ("L['self'].a.b", nn.Module)}
    for more in (False, True):
        with pytest.raises(MqAoError, match=message) as caught:
            collect(module, [Request(name, covariance=more, quantiles=more)], [(batch,) for batch in batches])
        assert "\n" not in str(caught.value)


def test_batches_that_do_not_fit_the_graph() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(MqAoError, match="a batch is a tuple of the graph's inputs, not a Tensor"):
        collect(graph_of(), [Request("x")], [x])  # type: ignore[list-item]
    with pytest.raises(MqAoError, match="a batch holds 2 inputs, but the graph takes 1"):
        collect(graph_of(), [Request("x")], [(x, x)])


@settings(max_examples=30, deadline=None)
@given(q=st.floats(0.001, 1), count=st.integers(1, 3000), seed=st.integers(0, 2**31))
def test_quantiles_are_right_to_half_a_bin(q: float, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1e-9, 1e-3, 1.0, 7.0, 1e9])
    x = torch.randn(count, 5, generator=generator).exp().mul(scale)
    x[1::2].neg_()
    # The histogram and numpy may disagree by rounding on which of two neighbours the rank q * count falls.
    expected = [np.quantile(x.abs().double(), min(max(p, 0), 1), axis=0, method="inverted_cdf") for p in (q - 1e-9, q)]
    found = of(x, covariance=False).quantile(q).numpy()
    assert (found >= expected[0] * (1 - HALF_BIN)).all() and (found <= expected[1] * (1 + HALF_BIN)).all()


def test_quantiles_at_the_ends_of_the_range() -> None:
    stats = of(x := torch.tensor([[0.0, 1e-20, 1e20, 3.0], [0.0, -2e-20, -2e20, 0.0]]))
    assert torch.equal(stats.quantile(1.0), x.abs().amax(0).double())
    assert stats.quantile(0.99)[2] == stats.maximum[2]
    assert stats.quantile(0.99)[:2].count_nonzero() == 0 and stats.quantile(0.5)[3] == 0
    assert torch.equal(stats.quantile(0.0), stats.quantile(0.5))
    with pytest.raises(MqAoError, match="within 0..1"):
        stats.quantile(1.1)


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """Correlated channels of different spread, (300, 6) float64."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.randn(300, 6, generator=generator, dtype=torch.float64) @ mix + 0.5


def test_scaled_is_exact_and_its_histogram_moves(sample: Tensor) -> None:
    octaves = torch.tensor([1.0, 2.0, 0.25, 8.0, 0.5, 4.0])
    assert_same(of(sample).scaled(octaves), of(sample * octaves))
    s = torch.tensor([0.01, 0.3, 1.1, 3.0, 70.0, 1.0])
    scaled, expected = of(sample).scaled(s), of(sample * s)
    assert_same(scaled, replace(expected, histogram=None))
    # Half a bin from the shift and half a bin from either histogram's centres.
    assert torch.allclose(scaled.quantile(0.9), expected.quantile(0.9), rtol=(1 + HALF_BIN) ** 3 - 1)


def test_scaled_keeps_counts_at_the_ends_of_the_range() -> None:
    stats = of(torch.tensor([[0.0], [2.0**-39], [1.0], [2.0**39], [2.0**41]]))
    for factor, ends in ((2.0**-3, (2, 1)), (2.0**3, (1, 2))):
        moved = stats.scaled(torch.tensor([factor])).histogram
        assert moved is not None and moved.sum() == 5 and (moved[0, 0], moved[0, BINS - 1]) == ends


@pytest.mark.parametrize("s", [[1.0, 2.0], [1.0] * 5 + [0.0], [1.0] * 5 + [-1.0], [1.0] * 5 + [float("nan")]])
def test_scaled_takes_positive_factors_only(sample: Tensor, s: list[float]) -> None:
    with pytest.raises(MqAoError, match="scaled by as many positive, finite factors"):
        of(sample).scaled(torch.tensor(s))


def test_second_moments_in_float32_differ_by_their_rounding_alone() -> None:
    half = Request("x", covariance=True, precision=torch.float32)
    assert (half | half).precision == torch.float32 and (half | Request("x")).precision == torch.float64
    batches = [(torch.randn(40, 9, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    found, exact = (collect(graph_of(), [one], batches)["x"] for one in (half, Request("x", covariance=True)))
    assert found.moments.dtype == torch.float32
    # 120 products, each and each sum rounded to 24 bits.
    torch.testing.assert_close(found.moments.double(), exact.moments, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.total, exact.total) and found.squares.dtype == torch.float64


def test_rotated_knows_moments_and_refuses_the_rest(sample: Tensor) -> None:
    R = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    rotated = of(sample).rotated(R)
    assert_same(rotated, of(sample @ R))
    for ask in (lambda: rotated.maximum, lambda: rotated.extremes, lambda: rotated.merged(rotated).maximum):
        with pytest.raises(MqAoError, match="not known after a rotation"):
            ask()
    with pytest.raises(MqAoError, match="before any rotation"):
        rotated.quantile(0.5)
    with pytest.raises(MqAoError, match="does not rotate 6 channels"):
        of(sample).rotated(torch.eye(5))
    with pytest.raises(MqAoError, match="covariance=True"):
        of(sample, covariance=False).rotated(R)


def test_rotated_may_narrow_and_can_be_scaled_selected_and_rotated_again(sample: Tensor) -> None:
    R, s = torch.arange(24.0).sin().view(6, 4).double(), torch.tensor([1.0, 3.0])
    rotated = of(sample).rotated(R).selected(1, 3).scaled(s).rotated(torch.eye(2))
    assert_same(rotated, of((sample @ R)[:, 1:3] * s))


def test_selected_is_that_of_the_channels(sample: Tensor) -> None:
    assert_same(of(sample).selected(2, 5), of(sample[:, 2:5]))
    for start, stop in [(0, 7), (3, 3), (-2, 6)]:
        with pytest.raises(MqAoError, match="no channels"):
            of(sample).selected(start, stop)


def test_merged_is_that_of_all_rows(sample: Tensor) -> None:
    parts = [of(sample[:100]), of(sample[100:])]
    assert_same(parts[0].merged(parts[1]), of(sample))
    poor = parts[0].merged(of(sample[100:], covariance=False, quantiles=False))
    assert poor.moments is None and poor.histogram is None
    assert_same(poor, of(sample, covariance=False, quantiles=False))
    with pytest.raises(MqAoError, match="6 and 5 channels"):
        parts[0].merged(of(sample[:, :5]))


def test_what_was_not_collected_is_an_error(sample: Tensor) -> None:
    stats = of(sample, covariance=False, quantiles=False)
    with pytest.raises(MqAoError, match="covariance=True"):
        stats.covariance()
    with pytest.raises(MqAoError, match="quantiles=True"):
        stats.quantile(0.5)
    for ask in (lambda: of(sample[:1]).variance, of(sample[:1]).covariance):
        with pytest.raises(MqAoError, match="at least two tokens"):
            ask()


def test_a_constant_channel_has_no_variance_and_few_rows_are_not_enough() -> None:
    stats = of(torch.full((23, 6), 0.1))
    assert (stats.variance >= 0).all() and stats.variance.max() < EXACT
    assert not stats.enough_for_covariance
    assert stats.merged(of(torch.ones(1, 6))).enough_for_covariance


def test_statistics_are_a_mapping_that_does_not_change(sample: Tensor) -> None:
    stats = Statistics({"a": of(sample)})
    other = stats.replaced("a", of(sample[:10])).replaced("b", of(sample[:20]))
    assert {name: item.count for name, item in stats.items()} == {"a": 300}
    assert {name: item.count for name, item in other.items()} == {"a": 10, "b": 20}
    assert "b" not in stats and stats.get("b") is None


def test_shards_are_disjoint_and_complete() -> None:
    batches = [(torch.tensor(i),) for i in range(7)]
    shards = [list(shard(iter(batches), rank, 3)) for rank in range(3)]
    assert [len(part) for part in shards] == [3, 2, 2]
    assert sorted(int(x) for part in shards for (x,) in part) == list(range(7))
    assert list(shard(batches)) == batches
    with pytest.raises(MqAoError, match="rank 3 does not lie within a world of 3"):
        shard(batches, 3, 3)


REQUESTS = [Request("x", covariance=True, quantiles=True), Request("node_1", quantiles=True), Request("node_0")]


def widen(x: Tensor) -> Tensor:
    """More channels than x has."""
    return torch.cat([x, x.exp(), x.square()], dim=-1)


def rank_batches() -> list[tuple[Tensor]]:
    """The same batches in every process; odd in number, of unequal size."""
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(2, 3 + i, 5, generator=generator) * 3,) for i in range(5)]


def rank_main(rank: int, folder: str) -> None:
    """What each of two processes does; what it gets is written to `folder`, errors as text."""
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    module, batches = graph_of(widen, torch.neg), rank_batches()
    poisoned = [batches[0], (batches[1][0] * torch.nan,)]
    cases: dict[str, tuple[Any, Any]] = {
        "sharded": (shard(batches), shard(batches)),
        "empty rank": (batches, []),
        "failing rank": (batches, poisoned),
        "failing first rank": (poisoned, []),
        "all empty": ([], []),
        "other channels": (batches, [(torch.ones(2, 4),)]),
        "after failures": (batches[:2], batches[2:]),
    }
    results: dict[str, Any] = {}
    for name, inputs in cases.items():
        try:
            found = collect(module, REQUESTS if rank == 0 else REQUESTS[::-1], inputs[rank])
            results[name] = {node: vars(stats) for node, stats in found.items()}
        except MqAoError as error:
            results[name] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two real processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("case", ["sharded", "empty rank", "after failures"])
def test_two_processes_get_what_one_gets(ranks: list[dict[str, Any]], case: str, rank: int) -> None:
    alone = collect(graph_of(widen, torch.neg), REQUESTS, rank_batches())
    assert set(ranks[rank][case]) == set(alone)
    for node, found in ranks[rank][case].items():
        stats = ChannelStatistics(**found)
        assert [x is None for x in vars(stats).values()] == [x is None for x in vars(alone[node]).values()]
        assert torch.equal(stats.maximum, alone[node].maximum)
        assert_same(stats, alone[node])


FAILURES = {
    "failing rank": ("another rank failed", "NaN or Inf at node x"),
    "failing first rank": ("NaN or Inf at node x", "another rank failed"),
    "all empty": ("calibration is empty", "calibration is empty"),
    "other channels": ("different numbers of channels", "different numbers of channels"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_all_ranks_raise_together(ranks: list[dict[str, Any]], case: str) -> None:
    for rank, message in enumerate(FAILURES[case]):
        assert message in ranks[rank][case]
