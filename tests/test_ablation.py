"""The ablation: what its steps differ in, the plot, and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mq_ao import MqAoError, api
from mq_ao.ablation import Group, Row, all_steps, save_plot
from mq_ao.ablation import steps as steps_module
from mq_ao.ablation.steps import canonical, parse_bits, scheme
from mq_ao.cli.app import app
from mq_ao.graph import Role
from mq_ao.measuring import Measured
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.saving import save_pretrained
from mq_ao.passes import PASSES, Basis
from mq_ao.passes.rotate_residual import RotateResidual
from mq_ao.passes.smooth_state import Partner, SmoothState
from mq_ao.quantizer import Activation, RoleSpec
from tests.conftest import tokens


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


ROWS = [
    Row(name, group, bits, Measured((9.0, 9.0), (1.0, 1.0), (1.0, 1 + index / 50), (0.0, index / 100), (9.0, 8.0)))
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
    save_plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    save_plot(ROWS, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    for wanted in ("+ R5", "h C int8", "W8A8", "W4A8, that transform alone", "cost of the text against float"):
        assert f"<!-- {wanted}" in drawn
    with pytest.raises(MqAoError, match="must end in .png or .svg"):
        save_plot(ROWS, tmp_path / "plot.pdf")


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
    figures, plot, kept = tmp_path / "figures.json", tmp_path / "plot.svg", tmp_path / "rows"
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
    assert content["rows"][2]["cost"] == content["rows"][4]["cost"]
    cost = content["rows"][0]["cost"]
    assert cost["low"] <= cost["value"] <= cost["high"]
    assert plot.read_text().count("<svg") == 1
    assert len(list(kept.iterdir())) == 5
    monkeypatch.setattr(api, "quantize", lambda *_: pytest.fail("a finished row was measured again"))
    assert run(folder, *options, "--json", "-").exit_code == 0


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
    assert "does not exist" in refusal(run(folder, "--resume", tmp_path / "no" / "rows"))
    assert "is a file" in refusal(run(folder, "--resume", folder / "train.txt"))
    assert "needs two texts" in refusal(CliRunner().invoke(app, ["ablate", str(folder / "model")]))
