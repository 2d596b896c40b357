"""Mixed precision under a budget: parsing, the knapsack, what is simulated, the search, and the command."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner, Result

import mq_ao
from mq_ao import MqAoError, api
from mq_ao.budget import Budget, Found, Quantity, parse_budget, search_budget
from mq_ao.budget.bisection import first_passing
from mq_ao.budget.knapsack import Item, pareto_front
from mq_ao.budget.scoring import joined, score
from mq_ao.budget.sensitivity import float_logits
from mq_ao.budget.sites import Choice, Site, chosen_recipe, find_sites
from mq_ao.cli.app import app
from mq_ao.graph import Role
from mq_ao.measuring.digests import of_recipe
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.saving import save_pretrained
from mq_ao.quantizer import Activation, QuantizationConfig, RoleSpec, Rounding
from mq_ao.recipe_files import to_yaml
from mq_ao.recipes import RECIPES, Recipe, get_recipe
from tests.conftest import tokens

W4 = RoleSpec(bits=4, group_size=64)
W8 = RoleSpec()


@pytest.mark.parametrize(
    ("text", "quantity", "limit"),
    [
        ("size<=0.20", Quantity.SIZE, 0.2),
        (" size <= 20 % ", Quantity.SIZE, 0.2),
        ("loss<=0.5%", Quantity.LOSS, 0.005),
        ("loss<=.005", Quantity.LOSS, 0.005),
        ("loss<=100%", Quantity.LOSS, 1.0),
    ],
)
def test_budgets_are_read(text: str, quantity: Quantity, limit: float) -> None:
    assert parse_budget(text) == Budget(quantity, pytest.approx(limit))
    assert parse_budget(str(parse_budget(text))) == parse_budget(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the budget is '': write a limit such as"),
        ("small", "write a limit such as"),
        ("size=0.2", "write a limit such as"),
        ("size<0.2", "write a limit such as"),
        ("size>=0.2", "write a limit such as"),
        ("size<=-1", "write a limit such as"),
        ("size<=nan", "write a limit such as"),
        ("size<=0.2 loss<=1%", "write a limit such as"),
        ("memory<=0.2", "limits memory: limit size or loss"),
        ("Size<=0.2", "limits Size: limit size or loss"),
        ("latency<=2", "no budgets of latency"),
        ("size<=0", "allows nothing"),
        ("size<=1", "allows the float model"),
        ("size<=20", "allows the float model"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        parse_budget(text)


# Few different numbers, so that sizes and losses tie.
ITEMS = st.builds(Item, st.integers(0, 12), st.integers(-3, 9).map(float))


@given(st.lists(st.lists(ITEMS, min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_front_is_that_of_all_choices(sites: list[list[Item]]) -> None:
    sums = {}
    for items in itertools.product(*sites):
        size, loss = sum(item.size for item in items), sum(item.loss for item in items)
        sums[size] = min(loss, sums.get(size, loss))
    best = [(size, loss) for size, loss in sums.items() if all(loss < sums[other] for other in sums if other < size)]
    found = pareto_front(sites)
    assert [(point.size, point.loss) for point in found] == sorted(best)
    for point in found:
        items = [items[index] for items, index in zip(sites, point.chosen, strict=True)]
        assert (point.size, point.loss) == (sum(one.size for one in items), sum(one.loss for one in items))


def test_a_large_front_stays_feasible_and_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    sites = [
        [Item(size, 1000 / size + generator.random()) for size in sorted(generator.sample(range(100, 999), 4))]
        for _ in range(12)
    ]
    exact = pareto_front(sites)
    monkeypatch.setattr("mq_ao.budget.knapsack._MOST", 64)
    rounded = pareto_front(sites)
    assert len(rounded) <= 64 < len(exact)
    for point in rounded:
        assert point.size == sum(items[index].size for items, index in zip(sites, point.chosen, strict=True))
        # Each of 12 sizes is rounded up by less than a unit, of which there are at least 32 in the largest sum.
        smaller = [one.loss for one in exact if one.size <= point.size * (1 - 12 / 32)]
        assert not smaller or point.loss <= smaller[-1]


def test_a_site_without_items_is_refused() -> None:
    with pytest.raises(MqAoError, match="nothing to choose from"):
        pareto_front([[Item(1, 1)], []])


@given(st.data())
def test_the_first_that_passes_is_found_in_few_tries(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3000))
    first, guess = data.draw(st.integers(0, count - 1)), data.draw(st.integers(-5, count + 5))
    asked = []

    def passes(index: int) -> bool:
        assert 0 <= index < count - 1
        asked.append(index)
        return index >= first

    assert first_passing(passes, count, guess) == first
    # Doubling steps from 8 on reach any distance in its logarithm, and halves take as many again.
    assert len(asked) <= 5 + 2 * max(4, math.log2(abs(first - guess) + 1))


def site(module: str, role: Role = Role.IN_PROJ) -> Site:
    return Site(module, role, (module,), ((64, 64),), W4, (W8, W4), ())


def resolved(recipe: Recipe, module: str, role: Role = Role.IN_PROJ) -> Choice:
    """As the quantizer finds it: by the longest module name."""
    names = [name for name in recipe.modules if module == name or module.startswith(f"{name}.")]
    if names:
        roles = recipe.modules[max(names, key=len)]
        return roles[role] if role in roles else recipe.scheme.roles.get(role)
    return recipe.scheme.roles.get(role)


SCHEME = QuantizationConfig({Role.IN_PROJ: W4, Role.DT_PROJ: W8})


@pytest.mark.parametrize(
    "modules", [{}, {"a": {Role.IN_PROJ: W8, Role.HEAD: None}}, {"a.b": {Role.IN_PROJ: None}, "c": {Role.DT_PROJ: W4}}]
)
@given(st.lists(st.sampled_from([None, W4, W8]), min_size=6, max_size=6))
def test_a_recipe_says_what_was_chosen(modules: Mapping[str, Mapping[Role, Choice]], drawn: list[Choice]) -> None:
    sites = [site(name) for name in ("a.b", "a.b.c", "a.d", "c", "e")] + [site("a.b", Role.DT_PROJ)]
    base = Recipe("base", SCHEME, (), modules)
    recipe = chosen_recipe(base, "mixed", dict(zip(sites, drawn, strict=True)))
    assert [resolved(recipe, one.module, one.role) for one in sites] == drawn
    assert [resolved(recipe, "a.z"), resolved(recipe, "z")] == [resolved(base, "a.z"), resolved(base, "z")]
    assert resolved(recipe, "a.b", Role.HEAD) == resolved(base, "a.b", Role.HEAD)


def test_modules_of_a_recipe_have_their_say(tiny: MambaLM, calibration: list[Tensor]) -> None:
    last = "backbone.layers.1.mixer"
    modules = {f"{last}.in_proj": {Role.IN_PROJ: W8}, last: {Role.DT_PROJ: None}}
    recipe = Recipe("mixed", RECIPES["rtn-w4a8"].scheme, (), modules)
    assert of_recipe(recipe) != of_recipe(RECIPES["rtn-w4a8"])
    assert "float, in backbone.layers.1.mixer" in str(recipe)
    report = api.quantize(tiny, calibration, recipe).report().quantization
    details = {(one.module, one.role): one.detail for one in report.decisions}
    first = "backbone.layers.0.mixer"
    assert details[f"{first}.in_proj", Role.IN_PROJ].startswith("int4 weight in groups of 64")
    assert details[f"{last}.in_proj", Role.IN_PROJ].startswith("int8 weight, static")
    assert details[f"{last}.out_proj", Role.OUT_PROJ].startswith("int4 weight in groups of 64")
    assert details[first, Role.DT_PROJ].startswith("int8 weight")
    assert details[last, Role.DT_PROJ] == "switched off by the configuration"
    with pytest.raises(MqAoError, match="module named 'layers.9'; the modules are backbone.embedding"):
        api.quantize(tiny, calibration, Recipe("other", SCHEME, (), {"layers.9": {Role.IN_PROJ: None}}))


@pytest.fixture(scope="module")
def model(tiny: MambaLM) -> MambaLM:
    """The tiny model with opinions on what comes next, so that errors cost something."""
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(10)
        model.backbone.norm_f.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def validation(model: MambaLM) -> list[Tensor]:
    """Text that is drawn from the model, which no other one predicts better."""
    generator = torch.Generator().manual_seed(0)
    ids = tokens(32, 1, seed=7)
    with torch.no_grad():
        for _ in range(23):
            logits, *_ = model(ids, *model.initial_states(len(ids)))
            ids = torch.cat((ids, torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)), 1)
    return list(ids.split(16))


@pytest.fixture(scope="module")
def found(model: MambaLM, calibration: list[Tensor], validation: list[Tensor]) -> Found:
    """A search from a recipe with rotations and roundings for the loss."""
    return search_budget(model, calibration, validation, "size<=0.31", "mambaquant-w4a8")


def test_a_budget_of_size_is_kept_by_the_program(found: Found, model: MambaLM) -> None:
    float_bytes = sum(parameter.nbytes for parameter in model.parameters())
    program = found.quantized.lower()
    assert found.chosen.size == program.weight_bytes / float_bytes <= 0.31
    # The prediction was exact, and the next larger candidate would not have fitted.
    fitting = [one for one in found.front if one.size <= 0.31]
    assert found.chosen.choices == fitting[-1].choices and found.chosen.size == fitting[-1].size
    assert found.chosen.size > 0.2, "little of what was allowed is used"
    sizes, losses = [one.size for one in found.front], [one.predicted for one in found.front]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)


def test_a_choice_loses_less_than_random_ones_of_its_size(
    found: Found, model: MambaLM, calibration: list[Tensor], validation: list[Tensor]
) -> None:
    generator = random.Random(0)
    base = get_recipe("mambaquant-w4a8")
    sites = list(found.chosen.choices)
    size = sum(one.size(choice) for one, choice in found.chosen.choices.items())
    randoms: list[dict[Site, Choice]] = []
    while len(randoms) < 3:
        drawn: dict[Site, Choice] = {one: generator.choice(one.widths) for one in sites}
        if 0.95 * size <= sum(one.size(choice) for one, choice in drawn.items()) <= size:
            randoms.append(drawn)
    assert found.chosen.measured is not None
    for drawn in randoms:
        quantized = api.quantize(model, calibration, chosen_recipe(base, "random", drawn))
        inputs = [(ids, *model.initial_states(len(ids))) for ids in validation]
        measured = joined(
            score(float_logits(model, one), float_logits(quantized.converted, one), one[0])
            for one in inputs  # type: ignore[arg-type]
        )
        assert found.chosen.measured.mean_divergence <= measured.mean_divergence


def test_the_recipe_file_gives_the_same_program(
    found: Found, model: MambaLM, calibration: list[Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(to_yaml(found.recipe))
    assert get_recipe(path) == found.recipe
    quantized = mq_ao.quantize(model, calibration, path)
    program = quantized.lower()
    assert program.weight_bytes == found.program.weight_bytes
    ids = tokens(2, 9, seed=3)
    for ours, theirs in zip(program.prefill(ids), found.program.prefill(ids), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_simulated_is_what_is_converted(
    model: MambaLM, calibration: list[Tensor], validation: list[Tensor]
) -> None:
    from mq_ao.budget.search import _Search

    recipe = get_recipe("mambaquant-w4a8")
    search = _Search.begin(api.rewrite(model, calibration, recipe), recipe, validation, progress=False)
    generator = random.Random(1)
    choices: dict[Site, Choice] = {one: generator.choice([*one.widths, *one.others, None]) for one in search.sites}
    assert len({choice and choice.activation for choice in choices.values()}) == 3
    mixed = chosen_recipe(recipe, "mixed", choices)
    quantizer = mixed.quantizer("native")
    converted = search.rewritten.copied().prepared(mixed, quantizer, search.statistics).quantized().converted
    for inputs in search.batches:
        simulated = search.simulated.logits(inputs, choices)
        # The same float32 operations, but for the order of sums over a token's channels.
        torch.testing.assert_close(simulated, float_logits(converted, inputs), rtol=1e-4, atol=1e-4)
    # Alternatives that share what comes before are what they are alone.
    others = [(one, choice) for one in search.simulated.ordered(search.sites) for choice in (one.widths[0], None)]
    found = list(search.simulated.branches(search.batches[0], choices, others))
    assert len(found) == len(others) + 1
    for (one, choice), logits in zip([*others, (search.sites[0], choices[search.sites[0]])], found, strict=True):
        assert torch.equal(logits, search.simulated.logits(search.batches[0], {**choices, one: choice}))


def test_a_budget_of_loss_is_kept_when_measured(
    model: MambaLM, calibration: list[Tensor], validation: list[Tensor], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    arguments = (model, calibration, validation)
    loose = search_budget(*arguments, "loss<=5%", "rtn-w4a8", resume=kept)
    assert loose.loss <= 0.05
    files = {path.name: path.read_bytes() for path in kept.iterdir()}
    # Around what the uniform 4 bits lose, so that something has to be chosen.
    uniform = loose.uniform["rtn-w4a8"].measured
    assert uniform is not None and uniform.change > 0
    tight = search_budget(*arguments, Budget(Quantity.LOSS, uniform.change / 3), "rtn-w4a8", resume=kept)
    assert tight.loss <= uniform.change / 3 and tight.chosen.size > loose.chosen.size
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == files
    next(kept.iterdir()).write_text("[]")
    with pytest.raises(MqAoError, match="holds 0 measurements, not .*: remove it, or resume in another folder"):
        search_budget(*arguments, "loss<=5%", "rtn-w4a8", resume=kept)


def test_budgets_that_cannot_be_kept_say_what_can(
    model: MambaLM, calibration: list[Tensor], validation: list[Tensor]
) -> None:
    with pytest.raises(MqAoError, match=r"size<=0.05 cannot be kept: the smallest program .* 0\.\d+ of the float32"):
        search_budget(model, calibration, validation, "size<=0.05", "rtn-w4a8")
    # The convolution and the embedding stay quantized.
    with pytest.raises(MqAoError, match="cannot be kept even with every linear at its best"):
        search_budget(model, calibration, validation, Budget(Quantity.LOSS, 1e-9), "rtn-w4a8")


def test_bad_validation_is_refused(tiny: MambaLM, calibration: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "rewrite", lambda *_, **__: pytest.fail("a model was captured"))
    for bad, message in (
        ([tokens(4, 1)], r"validation is \(4, 1\) torch.int64"),
        ([torch.zeros(4, 9)], r"validation is \(4, 9\) torch.float32"),
        ([tokens(1, 9)], "fewer than two sequences"),
        ([], "fewer than two sequences"),
    ):
        with pytest.raises(MqAoError, match=message):
            search_budget(tiny, calibration, bad, "size<=0.3", "rtn-w4a8")


def test_recipes_of_narrow_activations_are_refused(tiny: MambaLM, calibration: list[Tensor]) -> None:
    with pytest.raises(MqAoError, match="mambaquant-w4a4 has activations of 4 bits"):
        search_budget(tiny, calibration, calibration, "size<=0.3", "mambaquant-w4a4")


def test_sites_offer_what_the_recipe_allows(tiny: MambaLM, calibration: list[Tensor]) -> None:
    recipe = get_recipe("mambaquant-w4a16")
    rewritten = api.rewrite(tiny, calibration, recipe)
    sites = {one.name: one for one in find_sites(rewritten.graph, recipe.quantizer("native"), recipe)}
    assert len(sites) == 9
    out = sites["backbone.layers.0.mixer.out_proj"]
    assert [(spec.bits, spec.group_size) for spec in out.widths] == [(8, None), (4, None), (4, 64)]
    assert {spec.activation for spec in out.widths} == {Activation.NONE} and out.others == ()
    assert out.widths[1].rounding is out.widths[2].rounding is Rounding.FISHER
    # A group of 64 is all of a row of 64 inputs, and 4 inputs are no group.
    assert len(sites["backbone.layers.0.mixer.in_proj"].widths) == 2
    assert len(sites["backbone.layers.0.mixer (dt_proj)"].widths) == 2
    assert out.size(None) == 4 * 64 * 128


def test_a_weight_that_is_shared_is_no_site(tiny: MambaLM, calibration: list[Tensor]) -> None:
    for name, wanted in (
        ("rtn-w4a8", 8),
        ("quarot-w4a8", 9),
    ):  # folding gives the head its own
        recipe = get_recipe(name)
        graph = api.rewrite(tiny, calibration, recipe).graph
        assert len(find_sites(graph, recipe.quantizer("native"), recipe)) == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and a text."""
    folder = tmp_path_factory.mktemp("budget")
    torch.manual_seed(0)
    save_pretrained(MambaLM(MambaConfig(vocab_size=256, d_model=32, n_layer=1)), folder / "model")
    (folder / "train.txt").write_bytes(bytes(tokens(4096, seed=1).tolist()))
    return folder


def run(folder: Path, *options: str | Path) -> Result:
    given = (folder / "model", "--calibration", folder / "train.txt", "--tokens", "1024", *options)
    return CliRunner().invoke(app, ["quantize", *map(str, given)])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("mixed.ptn", "mixed.yaml", "mixed.svg", "again.ptn")}
    options = ("--budget", "size<=0.46", "--recipe", "rtn-w4a8", "--save-recipe", files["mixed.yaml"])
    result = run(
        folder, *options, "--plot", files["mixed.svg"], "--resume", tmp_path / "kept", "-o", files["mixed.ptn"]
    )
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for wanted in ("rtn-w4a8", "8 bits", "best for its size", "chosen for size<=0.46", "KL predicted", "of float32"):
        assert wanted in shown
    assert float(shown.rpartition("resident weights")[2].split()[2]) <= 0.46
    assert "chosen: in_proj 1 x" in result.stderr
    assert files["mixed.svg"].read_text().count("<svg") == 1 and list((tmp_path / "kept").iterdir())
    again = run(folder, "--recipe", files["mixed.yaml"], "-o", files["again.ptn"])
    assert again.exit_code == 0, again.output
    assert mq_ao.load(files["again.ptn"]).weight_bytes == mq_ao.load(files["mixed.ptn"]).weight_bytes


def test_bad_options_of_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "rewrite", lambda *_, **__: pytest.fail("a model was captured"))

    def refusal(*options: str | Path, output: str = "mixed.ptn") -> str:
        result = run(folder, *options, "-o", tmp_path / output)
        assert isinstance(result.exception, MqAoError), result.output
        return str(result.exception)

    budget = ("--budget", "size<=0.2")
    assert "no budgets of latency" in refusal("--budget", "latency<=2")
    assert "--plot is of a search" in refusal("--plot", tmp_path / "a.svg")
    assert "--resume is of a search" in refusal("--resume", tmp_path / "kept")
    assert "end in .png or .svg" in refusal(*budget, "--plot", tmp_path / "a.pdf")
    assert "is a file" in refusal(*budget, "--resume", folder / "train.txt")
    assert "counts the bytes of native programs" in refusal(*budget, output="mixed.pt2")
    assert ".yaml" in refusal(*budget, "--save-recipe", tmp_path / "mixed.txt")
    assert "has recipes of its own" in refusal(*budget, "--format", "compressed-tensors", output="mixed")
