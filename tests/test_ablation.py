"""The ablation: what its steps differ in, rows that are taken up again, and the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from typer.testing import CliRunner, Result

from mq_ao import MqAoError, api
from mq_ao.ablation import Group, Measured, Row, Step, TextMetric, ablate, all_steps, save_plot
from mq_ao.ablation import steps as steps_module
from mq_ao.ablation.run import check_disjoint, first_tokens
from mq_ao.ablation.steps import canonical, parse_bits, scheme
from mq_ao.cli.app import app
from mq_ao.graph import Role
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.saving import save_pretrained
from mq_ao.passes import PASSES, Basis
from mq_ao.passes.rotate_residual import RotateResidual
from mq_ao.passes.smooth_state import Partner, SmoothState
from mq_ao.quantizer import Activation, RoleSpec
from mq_ao.recipes import Recipe
from mq_ao.text import TokenText
from tests.conftest import tokens

PLAIN = Recipe("plain")
FOLDED = Recipe("folded", passes=(PASSES["fold_norm"](),))


@dataclass
class Counting:
    """A metric that only counts how often it is asked."""

    fingerprint: str = "data"
    name: str = "cost"
    fails_at: int | None = None
    graphs: list[GraphModule] = field(default_factory=list)

    def __call__(self, converted: GraphModule) -> Measured:
        if len(self.graphs) == self.fails_at:
            raise KeyboardInterrupt
        self.graphs.append(converted)
        return Measured(len(self.graphs), 1.0, 0.1, 0.9)


def step(name: str, recipe: Recipe, group: Group = Group.CHAIN) -> Step:
    return Step(name, group, 8, recipe)


@pytest.fixture
def unquantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows are kept does not depend on what quantization yields."""
    monkeypatch.setattr(api, "quantize", lambda *_: SimpleNamespace(converted=GraphModule({}, Graph())))


STEPS = [step("plain", PLAIN), step("folded", FOLDED), step("again", Recipe("another name"), Group.ALONE)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outliers", [None, 30.0])
def test_passes_stand_in_the_order_of_the_method(bits: int, outliers: float | None) -> None:
    order = [
        "plant_outliers fold_norm smooth_gate smooth_state smooth_dt smooth_conv shift_dt",
        "rotate_residual rotate_dt rotate_out_proj expose_state rotate_state",
    ]
    places = {name: index for index, name in enumerate(" ".join(order).split())}
    for item in all_steps(bits, outliers):
        names = [one.name for one in item.recipe.passes]
        assert (names[:1] == ["plant_outliers"]) == (outliers is not None)
        assert item.bits == bits
        if item.name not in ("rtn", "smoothquant", "quarot", "mambaquant"):
            assert sorted(names, key=places.__getitem__) == names


@pytest.mark.parametrize("bits", [8, 4])
def test_the_chain_adds_one_transform_at_a_time_and_keeps_everything_else(bits: int) -> None:
    chain = [item for item in all_steps(bits) if item.group is Group.CHAIN]
    *fixed, production = chain
    assert production.name == "mambaquant"
    assert all(item.recipe.scheme.roles == scheme(bits).roles for item in fixed)
    added = [
        {one.name for one in after.recipe.passes} - {one.name for one in before.recipe.passes}
        for before, after in itertools.pairwise(fixed)
    ]
    assert added == [
        {"fold_norm", "rotate_residual"},
        set(),
        {"rotate_dt"},
        {"rotate_out_proj"},
        {"smooth_gate"},
        {"smooth_dt"},
        {"smooth_conv"},
        {"smooth_state"},
        {"shift_dt"},
    ]
    bases = [one.basis for item in fixed[1:3] for one in item.recipe.passes if isinstance(one, RotateResidual)]
    assert bases == [Basis.HADAMARD, Basis.KLT]
    alone = [item for item in all_steps(bits) if item.group is Group.ALONE]
    assert [item.name for item in alone] == [item.name for item in fixed[1:]]
    assert all(item.recipe.scheme.roles == scheme(bits).roles for item in alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_chains_scheme_is_static_with_scan_operands(bits: int) -> None:
    roles = scheme(bits).roles
    assert roles[Role.SCAN] == RoleSpec()
    assert not {Role.GATE, Role.STATE} & set(roles)
    assert {spec.activation for role, spec in roles.items() if role is not Role.EMBEDDING} == {Activation.STATIC}
    assert roles[Role.OUT_PROJ].bits == bits


def test_h_c_is_quantized_with_and_without_its_transforms() -> None:
    state = [item for item in all_steps(8) if item.group is Group.STATE]
    names = [{one.name for one in item.recipe.passes} & {"smooth_state", "rotate_state"} for item in state]
    assert names == [set(), {"smooth_state"}, {"rotate_state"}, {"smooth_state", "rotate_state"}]
    assert all(Role.STATE in item.recipe.scheme.roles for item in state)
    smoothing = [one for item in state for one in item.recipe.passes if isinstance(one, SmoothState)]
    assert {one.partner for one in smoothing} == {Partner.STATE}


def test_a_later_pass_takes_the_place_of_an_earlier_one() -> None:
    hadamard, klt = RotateResidual(Basis.HADAMARD), RotateResidual(Basis.KLT)
    assert canonical([hadamard, PASSES["fold_norm"](), klt]) == (PASSES["fold_norm"](), klt)


def test_bits_are_8_and_4() -> None:
    assert parse_bits("8, 4") == (8, 4)
    for wrong in ("", "16", "8,8"):
        with pytest.raises(MqAoError, match="--bits is"):
            parse_bits(wrong)
    with pytest.raises(MqAoError, match="--outliers is 1"):
        all_steps(8, 1.0)


@pytest.mark.usefixtures("unquantized")
def test_finished_rows_are_not_measured_again(tiny: MambaLM, calibration: list[Tensor], tmp_path: Path) -> None:
    kept, metric, told = tmp_path / "rows.jsonl", Counting(), []
    rows = ablate(tiny, calibration, metric, STEPS, resume=kept, progress=lambda *arguments: told.append(arguments))
    # The third step has the first one's recipe under another name.
    assert [row.measured.value for row in rows] == [1, 2, 1]
    assert [(row.name, row.group, row.bits) for row in rows] == [(item.name, item.group, 8) for item in STEPS]
    assert told[:2] == [(0, "plain, W8A8"), (1, None)]
    assert [json.loads(line)["value"] for line in kept.read_text().splitlines()] == [1, 2]
    again = Counting()
    assert ablate(tiny, calibration, again, STEPS, resume=kept) == rows
    assert again.graphs == []


@pytest.mark.usefixtures("unquantized")
def test_a_run_that_was_cut_off_goes_on(tiny: MambaLM, calibration: list[Tensor], tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ablate(tiny, calibration, Counting(fails_at=1), STEPS, resume=kept)
    metric = Counting()
    ablate(tiny, calibration, metric, STEPS, resume=kept)
    assert len(metric.graphs) == 1


@pytest.mark.usefixtures("unquantized")
def test_other_data_other_models_and_other_options_are_measured(
    tiny: MambaLM, calibration: list[Tensor], tmp_path: Path
) -> None:
    kept = tmp_path / "rows.jsonl"
    ablate(tiny, calibration, Counting(), STEPS[:1], resume=kept)
    torch.manual_seed(1)
    other = MambaLM(MambaConfig(vocab_size=256, d_model=64, n_layer=2)).eval()
    scan = [step("scan", Recipe("scan", PLAIN.scheme.replaced(scan=RoleSpec())))]
    for arguments in (
        (other, calibration, Counting(), STEPS[:1]),
        (tiny, calibration[:-1], Counting(), STEPS[:1]),
        (tiny, calibration, Counting("other data"), STEPS[:1]),
        (tiny, calibration, Counting(), scan),
    ):
        ablate(*arguments, resume=kept)
        assert len(arguments[2].graphs) == 1


@pytest.mark.parametrize("content", ["not json", "[1]", '{"key": "a", "value": 1}', '{"value": 1}'])
def test_a_file_that_holds_something_else(
    tiny: MambaLM, calibration: list[Tensor], tmp_path: Path, content: str
) -> None:
    kept = tmp_path / "rows.jsonl"
    kept.write_text(content + "\n")
    with pytest.raises(MqAoError, match="does not hold rows of an ablation"):
        ablate(tiny, calibration, Counting(), STEPS, resume=kept)
    assert kept.read_text() == content + "\n"


def test_the_cost_of_a_text(tiny: MambaLM, calibration: list[Tensor]) -> None:
    ids = tokens(1, 65, seed=9)[0]
    metric, unsized = (TextMetric(tiny, TokenText((ids,), size)) for size in (64, None))
    (row,) = ablate(tiny, calibration, metric, STEPS[:1])
    assert (metric.name, unsized.name) == ("bits per byte", "perplexity")
    assert unsized.fingerprint != metric.fingerprint
    # Random weights hardly prefer any byte.
    assert row.measured.reference == pytest.approx(8, abs=0.5)
    assert row.measured.change == pytest.approx(row.measured.value / row.measured.reference - 1)
    assert 0 < row.measured.divergence < 0.01
    converted = api.quantize(tiny, calibration, PLAIN).converted
    assert metric(converted) == row.measured
    assert unsized(converted).reference == pytest.approx(2**row.measured.reference)


def test_the_beginning_of_a_text() -> None:
    first, second = torch.arange(5), torch.arange(8)
    text = TokenText((first, second), 11)
    short = first_tokens(text, 6)
    assert [len(document) for document in short.documents] == [5, 3]
    assert short.predicted == short.text_bytes == 6
    assert [len(document) for document in first_tokens(text, 4).documents] == [5]
    assert first_tokens(text, 99).predicted == 11
    assert first_tokens(TokenText((first, second), 50), 6).text_bytes is None
    with pytest.raises(MqAoError, match="at least one token"):
        first_tokens(text, 0)


def test_calibration_inside_the_evaluation_text_is_refused() -> None:
    text = TokenText((tokens(1, 40)[0], tokens(1, 50, seed=1)[0]), None)
    with pytest.raises(MqAoError, match="11 calibration tokens in a row stand in the text"):
        check_disjoint([tokens(2, 12, seed=5), text.documents[1][None, 7:19]], text)
    check_disjoint([tokens(2, 12, seed=5)], text)


ROWS = [
    Row(name, group, bits, Measured(1 + index / 100, 1.0, index / 1000, 0.9))
    for bits in (8, 4)
    for index, (name, group) in enumerate(
        [
            ("rtn", Group.BASELINE),
            ("static RTN", Group.CHAIN),
            ("+ R5", Group.CHAIN),
            ("+ R5", Group.ALONE),
            ("h C int8", Group.STATE),
        ]
    )
]


def test_the_plot(tmp_path: Path) -> None:
    save_plot(ROWS, "bits per byte", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    save_plot(ROWS, "bits per byte", tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    for wanted in ("+ R5", "h C int8", "W8A8", "W4A8, that transform alone", "bits per byte against float"):
        assert f"<!-- {wanted}" in drawn
    with pytest.raises(MqAoError, match="must end in .png or .svg"):
        save_plot(ROWS, "bits per byte", tmp_path / "plot.pdf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and two texts."""
    folder = tmp_path_factory.mktemp("ablation")
    torch.manual_seed(0)
    save_pretrained(MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)), folder / "model")
    (folder / "train.txt").write_bytes(bytes(tokens(900, seed=1).tolist()))
    (folder / "test.txt").write_bytes(bytes(tokens(300, seed=2).tolist()))
    return folder


def run(folder: Path, *options: str | Path, train: str = "train.txt", test: str = "test.txt") -> Result:
    texts = ("--calibration", folder / train, "--text", folder / test)
    return CliRunner().invoke(app, ["ablate", *map(str, (folder / "model", *texts, *options))])


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One transform and one baseline are enough to see that a table, a plot and a file come out.
    monkeypatch.setattr(steps_module, "BASELINES", ("rtn",))
    monkeypatch.setattr(steps_module, "CHAIN", steps_module.CHAIN[2:3])
    monkeypatch.setattr(steps_module, "STATE", steps_module.STATE[:1])
    figures, plot, kept = tmp_path / "figures.json", tmp_path / "plot.svg", tmp_path / "rows.jsonl"
    options = ("--bits", "8", "--outliers", "30", "--eval-tokens", "50", "--resume", kept)
    result = run(folder, *options, "--json", figures, "--plot", plot)
    assert result.exit_code == 0, result.output
    for wanted in ("static RTN", "+ R5", "mambaquant", "h C int8", "W8A8", "bits per byte"):
        assert wanted in result.stdout
    content = json.loads(figures.read_text())
    names = ["rtn", "static RTN", "+ R5", "mambaquant", "+ R5", "h C int8"]
    assert [row["name"] for row in content["rows"]] == names
    assert content["tokens"] == 50 and content["outliers"] == 30
    # The first transform of a chain is alone.
    assert content["rows"][2]["value"] == content["rows"][4]["value"]
    assert plot.read_text().count("<svg") == 1
    lines = kept.read_text()
    assert run(folder, *options, "--json", "-").exit_code == 0
    assert kept.read_text() == lines


def refusal(result: Result) -> str:
    assert isinstance(result.exception, MqAoError), result.output
    return str(result.exception)


def test_bad_arguments(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "quantize", lambda *_: pytest.fail("a model was quantized"))
    inside = (folder / "train.txt").read_bytes()
    (folder / "overlap.txt").write_bytes(b"x" + inside)
    assert "to calibrate and to evaluate on" in refusal(run(folder, test="train.txt"))
    assert "calibration tokens in a row" in refusal(run(folder, test="overlap.txt"))
    assert "--bits is '16'" in refusal(run(folder, "--bits", "16"))
    assert "--outliers is 0.5" in refusal(run(folder, "--outliers", "0.5"))
    assert "must end in .png or .svg" in refusal(run(folder, "--plot", tmp_path / "plot.pdf"))
    assert "at least one token" in refusal(run(folder, "--eval-tokens", "0"))
    assert "does not exist" in refusal(run(folder, "--resume", tmp_path / "no" / "rows.jsonl"))
    assert "needs two texts" in refusal(CliRunner().invoke(app, ["ablate", str(folder / "model")]))
