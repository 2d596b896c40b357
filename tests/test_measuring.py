"""Measuring recipes: intervals in simulated populations, pieces of text, what is kept, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from mq_ao import MqAoError, api
from mq_ao.cli.app import app
from mq_ao.measuring import Job, Measured, RecipeComparison, TextMetric, compare_recipes, difference, loss, measure
from mq_ao.measuring.bootstrap import LEVEL, ratio
from mq_ao.measuring.pieces import BLOCK, FEWEST, check_disjoint, first_tokens, pieces
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.saving import save_pretrained
from mq_ao.passes import PASSES
from mq_ao.quantizer import RoleSpec
from mq_ao.recipe_files import to_yaml
from mq_ao.recipes import Recipe, get_recipe
from mq_ao.text import TokenText, calibration_batches, calibration_draws
from tests.conftest import tokens

PLAIN = Recipe("plain")
FOLDED = Recipe("folded", passes=(PASSES["fold_norm"](),))
POPULATIONS = 150


def coverage(*, noise: float, per_draw: float, draws: int, seed: int) -> float:
    """Share of intervals that hold the true ratio, over populations in which pieces and draws vary.

    Pieces of 40 to 400 tokens cost 1 nat a token with a skewed spread, and 2 % more when quantized.
    """
    generator = numpy.random.default_rng(seed)
    held = 0
    for _ in range(POPULATIONS):
        weights = generator.integers(40, 400, 60).astype(float)
        excess = 0.02 + noise * (generator.exponential(1, (60, 1)) - 1) + per_draw * generator.normal(0, 1, draws)
        found = ratio(excess * weights[:, None], weights)
        held += found.low <= 0.02 <= found.high
    return held / POPULATIONS


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # Three standard deviations of a share of POPULATIONS, and for the skew of 60 pieces 2 points more below.
    spread = 3 * math.sqrt(LEVEL * (1 - LEVEL) / POPULATIONS)
    found = coverage(noise=0.05, per_draw=0.0, draws=1, seed=1)
    assert LEVEL - spread - 0.02 <= found <= LEVEL + spread


def test_intervals_count_the_noise_of_calibration() -> None:
    spread = 3 * math.sqrt(LEVEL * (1 - LEVEL) / POPULATIONS)
    # Eight draws: their spread is estimated from few numbers, for which a normal quantile is 5 points short
    # (Student's t with 7 degrees of freedom has 90.9 % within 1.96).
    found = coverage(noise=0.01, per_draw=0.02, draws=8, seed=2)
    assert 0.909 - spread - 0.02 <= found <= LEVEL + spread
    # The same noise, unseen: one draw knows nothing of it.
    assert coverage(noise=0.01, per_draw=0.02, draws=1, seed=2) < 0.3


def test_an_interval_is_that_of_a_mean() -> None:
    values = numpy.random.default_rng(3).normal(0.5, 1, (400, 1))
    found = ratio(values, numpy.ones(400))
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    # 4000 replicates put a quantile at 2.5 % within 2 % of a standard deviation or so.
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert ratio(values, numpy.ones(400)) == found
    with pytest.raises(MqAoError, match="two pieces of text"):
        ratio(values[:1], numpy.ones(1))


def simulated(excess: float, seed: int) -> list[Measured]:
    """Three draws of a recipe that costs a share more than float, on 60 pieces that differ much more than that."""
    generator, noise = numpy.random.default_rng(0), numpy.random.default_rng(seed)
    reference = generator.uniform(50, 200, 60)
    draws = []
    for _ in range(3):
        more = excess * (1 + 0.5 * noise.normal(size=60))
        columns = (numpy.full(60, 100.0), reference, reference * (1 + more), 50 * abs(more), numpy.full(60, 90.0))
        draws.append(Measured(*(tuple(map(float, column)) for column in columns)))
    return draws


def test_equal_recipes_differ_by_nothing_and_worse_ones_are_found_worse() -> None:
    good, worse = simulated(0.01, 1), simulated(0.013, 2)
    found = RecipeComparison({"good": good, "same": simulated(0.01, 1), "worse": worse})
    same, more = found.differences["good", "same"], found.differences["worse", "good"]
    assert {same.cost.value, same.cost.low, same.cost.high, same.divergence.low, same.divergence.high} == {0.0}
    assert found.among_best_cost("same") and found.among_best_divergence("same")
    # Costs of pieces differ by a hundred times more than recipes do: only pairs tell.
    assert 0 < more.cost.low < 0.003 < more.cost.high and more.divergence.low > 0
    assert not found.among_best_cost("worse") and not found.among_best_divergence("worse")
    assert found.best_cost == "good"
    assert loss(good).cost.value == pytest.approx(sum(one.change for one in good) / 3)
    assert found.losses["worse"].cost.value == pytest.approx(found.losses["good"].cost.value + more.cost.value)
    assert more.cost.high == pytest.approx(-found.differences["good", "worse"].cost.low)


def test_measurements_of_other_texts_are_not_paired() -> None:
    good = simulated(0.01, 1)
    other = [Measured(one.tokens, one.cost, one.cost, one.divergence, one.same) for one in good]
    with pytest.raises(MqAoError, match="cannot be paired"):
        difference(good, other)


def test_documents_are_pieces_where_there_are_enough() -> None:
    many = TokenText(tuple(torch.arange(5 + index) for index in range(FEWEST)), None)
    assert pieces(many).what == "documents"
    assert pieces(many).sizes == tuple(range(4, 4 + FEWEST))
    few = TokenText((torch.arange(20_001), torch.arange(1_001)), None)
    found = pieces(few)
    assert found.what == f"blocks of {BLOCK} tokens"
    assert sum(found.sizes) == 21_000
    # No block reaches from the first document into the second.
    assert found.sizes[39:] == (20_000 - 39 * BLOCK, BLOCK, 1_000 - BLOCK)
    assert found.sums(torch.ones(21_000, dtype=torch.float64)) == found.sizes
    assert pieces(TokenText((torch.arange(91),), None)).sizes == (3,) * 30
    with pytest.raises(MqAoError, match="one token is predicted"):
        pieces(TokenText((torch.arange(2),), None))


def test_draws_share_no_window() -> None:
    text = TokenText((torch.arange(64 * 20),), None)
    draws = calibration_draws(text, 64 * 5, 3, length=64)
    windows = [{int(row[0]) for batch in draw for row in batch} for draw in draws]
    assert [len(found) for found in windows] == [5, 5, 5]
    assert len(set.union(*windows)) == 15
    # Each is spread over the text.
    assert all(min(found) < 64 * 5 and max(found) >= 64 * 15 for found in windows)
    (only,) = calibration_draws(text, 64 * 5, 1, length=64)
    assert all(map(torch.equal, only, calibration_batches(text, 64 * 5, length=64)))
    with pytest.raises(MqAoError, match="need 21 windows of 64, and the calibration text has 20"):
        calibration_draws(text, 64 * 7, 3, length=64)
    with pytest.raises(MqAoError, match="--draws is 0"):
        calibration_draws(text, 64, 0)


def test_the_beginning_of_a_text() -> None:
    first, second = torch.arange(5), torch.arange(8)
    text = TokenText((first, second), 11)
    short = first_tokens(text, 6)
    assert [len(document) for document in short.documents] == [5, 3]
    assert short.predicted == short.text_bytes == 6
    assert [len(document) for document in first_tokens(text, 4).documents] == [5]
    assert first_tokens(text, 99).predicted == 11
    assert first_tokens(text, None) is text
    assert first_tokens(TokenText((first, second), 50), 6).text_bytes is None
    with pytest.raises(MqAoError, match="at least one token"):
        first_tokens(text, 0)


def test_calibration_inside_the_evaluation_text_is_refused() -> None:
    text = TokenText((tokens(1, 40)[0], tokens(1, 50, seed=1)[0]), None)
    with pytest.raises(MqAoError, match="11 calibration tokens in a row stand in the text"):
        check_disjoint([tokens(2, 12, seed=5), text.documents[1][None, 7:19]], text)
    check_disjoint([tokens(2, 12, seed=5)], text)


@dataclass
class Counting:
    """A metric that only counts how often it is asked."""

    fingerprint: str = "data"
    fails_at: int | None = None
    asked: list[Any] = field(default_factory=list)

    def __call__(self, quantized: Any) -> Measured:
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(quantized)
        return Measured((9.0,), (1.0,), (float(len(self.asked)),), (0.1,), (9.0,))


@pytest.fixture
def unquantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept does not depend on what quantization yields."""
    monkeypatch.setattr(api, "quantize", lambda *_: SimpleNamespace())


def jobs(batches: list[Tensor]) -> list[Job]:
    return [Job("plain", PLAIN, batches), Job("folded", FOLDED, batches), Job("again", Recipe("other"), batches)]


@pytest.mark.usefixtures("unquantized")
def test_finished_measurements_are_not_made_again(tiny: MambaLM, calibration: list[Tensor], tmp_path: Path) -> None:
    kept, metric, told = tmp_path / "runs", Counting(), []
    work = jobs(calibration)
    found = measure(tiny, metric, work, resume=kept, progress=lambda *arguments: told.append(arguments))
    # The third job has the first one's recipe under another name.
    assert [one.cost for one in found] == [(1.0,), (2.0,), (1.0,)]
    assert told[:2] == [(0, "plain"), (1, None)]
    assert sorted(json.loads(path.read_text())["cost"] for path in kept.iterdir()) == [[1.0], [2.0]]
    again = Counting()
    assert measure(tiny, again, work, resume=kept) == found
    assert again.asked == []


@pytest.mark.usefixtures("unquantized")
def test_a_run_that_was_cut_off_goes_on(tiny: MambaLM, calibration: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(tiny, Counting(fails_at=1), jobs(calibration), resume=tmp_path)
    metric = Counting()
    measure(tiny, metric, jobs(calibration), resume=tmp_path)
    assert len(metric.asked) == 1


@pytest.mark.usefixtures("unquantized")
def test_other_data_models_and_options_are_measured(tiny: MambaLM, calibration: list[Tensor], tmp_path: Path) -> None:
    (plain, *_) = jobs(calibration)
    measure(tiny, Counting(), [plain], resume=tmp_path)
    torch.manual_seed(1)
    other = MambaLM(MambaConfig(vocab_size=256, d_model=64, n_layer=2)).eval()
    scan = Job("scan", Recipe("scan", PLAIN.scheme.replaced(scan=RoleSpec())), calibration)
    for model, metric, job in (
        (other, Counting(), plain),
        (tiny, Counting(), Job("fewer", PLAIN, calibration[:-1])),
        (tiny, Counting("other data"), plain),
        (tiny, Counting(), scan),
    ):
        measure(model, metric, [job], resume=tmp_path)
        assert len(metric.asked) == 1


@pytest.mark.usefixtures("unquantized")
@pytest.mark.parametrize("content", ["not json", "[1]", '{"tokens": [1.0]}', '{"cost": 1}'])
def test_a_file_that_holds_something_else(
    tiny: MambaLM, calibration: list[Tensor], tmp_path: Path, content: str
) -> None:
    measure(tiny, Counting(), jobs(calibration)[:1], resume=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    with pytest.raises(MqAoError, match="is no measurement"):
        measure(tiny, Counting(), jobs(calibration), resume=tmp_path)
    assert kept.read_text() == content


def test_the_cost_of_a_text(tiny: MambaLM, calibration: list[Tensor]) -> None:
    ids = tokens(1, 65, seed=9)[0]
    metric, unsized = (TextMetric(tiny, TokenText((ids,), size)) for size in (64, None))
    assert (metric.unit, unsized.unit) == ("bits per byte", "perplexity")
    quantized = api.quantize(tiny, calibration, PLAIN)
    found = metric(quantized)
    # Random weights hardly prefer any byte.
    bits = metric.level(sum(found.reference))
    assert bits == pytest.approx(8, abs=0.5)
    assert unsized.level(sum(found.reference)) == pytest.approx(2**bits)
    assert found.tokens == (2.0,) * 32
    assert 0 < found.mean_divergence < 0.01
    assert Measured.parse(json.loads(json.dumps(vars(found)))) == found


def test_a_program_is_measured_where_it_is_asked_for(tiny: MambaLM) -> None:
    graph, lowered = (TextMetric(tiny, TokenText((tokens(1, 9)[0],), None), wanted) for wanted in (False, True))
    quantized: Any = SimpleNamespace(lower=lambda: tiny, converted=lambda *_: pytest.fail("the graph was run"))
    assert lowered(quantized).divergence == (0.0,) * 8
    assert lowered.fingerprint != graph.fingerprint


def test_more_bits_are_found_better(tiny: MambaLM) -> None:
    text = TokenText(tuple(tokens(FEWEST, 5, seed=2)), None)
    recipes = {name: get_recipe(name) for name in ("rtn-w8a8-dynamic", "rtn-w4a8")}
    found = compare_recipes(TextMetric(tiny, text), recipes, [[tokens(2, 16, seed=1)]])
    assert found.best_divergence == "rtn-w8a8-dynamic"
    assert found.differences["rtn-w4a8", "rtn-w8a8-dynamic"].divergence.low > 0
    assert not found.among_best_divergence("rtn-w4a8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, two texts and a recipe."""
    folder = tmp_path_factory.mktemp("comparison")
    torch.manual_seed(0)
    save_pretrained(MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)), folder / "model")
    (folder / "train.txt").write_bytes(bytes(tokens(1600, seed=1).tolist()))
    (folder / "test.txt").write_bytes(bytes(tokens(300, seed=2).tolist()))
    (folder / "mine.yaml").write_text(to_yaml(get_recipe("rtn-w8a8")))
    return folder


def run(folder: Path, *options: str | Path, train: str = "train.txt", test: str = "test.txt") -> Result:
    texts = ("--calibration", folder / train, "--text", folder / test)
    return CliRunner().invoke(app, ["compare", *map(str, (folder / "model", *texts, *options))])


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, kept = tmp_path / "figures.json", tmp_path / "runs"
    recipes = ("--recipe", "rtn-w8a8", "--recipe", "rtn-w4a8", "--recipe", folder / "mine.yaml")
    options = (*recipes, "--tokens", "512", "--draws", "2", "--resume", kept)
    result = run(folder, *options, "--json", figures)
    assert result.exit_code == 0, result.output
    for wanted in ("float32", "rtn-w8a8", "bits per byte", "cost, KL", "and 2 draws", "blocks of"):
        assert wanted in " ".join(result.stdout.split())
    content = json.loads(figures.read_text())
    assert [row["recipe"] for row in content["recipes"]] == ["rtn-w8a8", "rtn-w4a8", str(folder / "mine.yaml")]
    assert content["recipes"][0]["draws"] == content["recipes"][2]["draws"]
    assert content["recipes"][0]["draws"][0] != content["recipes"][0]["draws"][1]
    same = next(pair for pair in content["pairs"] if pair["against"] == str(folder / "mine.yaml"))
    assert same["cost"] == {"value": 0, "low": 0, "high": 0}
    assert len(list(kept.iterdir())) == 4
    monkeypatch.setattr(api, "quantize", lambda *_: pytest.fail("a finished recipe was measured again"))
    again = run(folder, *options, "--json", "-")
    assert json.loads(again.stdout) == content


def refusal(result: Result) -> str:
    assert isinstance(result.exception, MqAoError), result.output
    return str(result.exception)


def test_bad_arguments(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "quantize", lambda *_: pytest.fail("a model was quantized"))
    (folder / "overlap.txt").write_bytes(b"x" + (folder / "train.txt").read_bytes())
    recipe = ("--recipe", "rtn-w8a8", "--tokens", "512")
    assert "to calibrate and to evaluate on" in refusal(run(folder, *recipe, test="train.txt"))
    assert "calibration tokens in a row" in refusal(run(folder, *recipe, test="overlap.txt"))
    assert "given twice" in refusal(run(folder, *recipe, "--recipe", "rtn-w8a8"))
    assert "unknown recipe 'none'" in refusal(run(folder, "--recipe", "none"))
    assert "need 4 windows" in refusal(run(folder, *recipe, "--draws", "4"))
    assert "--outliers is 1" in refusal(run(folder, *recipe, "--outliers", "1"))
    assert "is a file" in refusal(run(folder, *recipe, "--resume", folder / "train.txt"))
    assert "needs two texts" in refusal(CliRunner().invoke(app, ["compare", str(folder / "model"), *recipe]))
