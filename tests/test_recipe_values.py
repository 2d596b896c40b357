"""What recipes, their passes and specs take; what they refuse, before anything runs; and that files say the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mq_ao import MqAoError
from mq_ao.graph import Role
from mq_ao.passes import PASSES, Basis, Pass, check_order, parse_pass
from mq_ao.passes.rotate_dt import RotateDt
from mq_ao.passes.smooth_gate import Size, SmoothGate
from mq_ao.passes.smooth_state import Partner
from mq_ao.quantizer import Activation, QuantizationConfig, Range, RoleSpec, Rounding, w8a8
from mq_ao.recipe_files import from_dict, read_recipe, to_dict, to_yaml
from mq_ao.recipes import RECIPES, Recipe, get_recipe

SHARES = sorted(
    (name, field.name) for name, kind in PASSES.items() for field in fields(kind) if field.name in ("alpha", "share")
)
CHOICES = (("rotate_residual", "basis"), ("rotate_dt", "basis"), ("smooth_state", "partner"), ("smooth_gate", "size"))
KINDS = {"basis": Basis, "partner": Partner, "size": Size}

SIZES = st.integers(1, 512).map(lambda count: 4 * count)


def specs(activations: list[Activation], sizes: st.SearchStrategy[int | None], widths: list[int]) -> Any:
    """Specs of such activations, groups and widths of activations, and of any weights."""
    bits, rounding = st.sampled_from([8, 4, 3]), st.sampled_from(Rounding)
    ranges, chosen = st.sampled_from(Range), st.sampled_from(activations)
    return st.builds(RoleSpec, chosen, ranges, bits, sizes, rounding, st.sampled_from(widths))


SPECS = st.one_of(
    specs([Activation.NONE, Activation.STATIC], st.none() | SIZES, [8]),
    specs([Activation.PER_TOKEN], st.none() | SIZES, [8, 4]),
    specs([Activation.PER_GROUP], SIZES, [8, 4]),
)
SHARE = st.floats(0, 1)
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    **{name: {option: SHARE} for name, option in SHARES},
    **{name: {option: st.sampled_from(KINDS[option])} for name, option in CHOICES},
    "smooth_gate": {"alpha": SHARE, "size": st.sampled_from(Size)},
    "plant_outliers": {"factor": st.floats(1, 1e6), "share": SHARE, "seed": st.integers(0, 2**63 - 1)},
}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe: passes in an order that is right, every option of theirs and of the roles."""
    chosen = draw(st.sets(st.sampled_from([name for name in PASSES if name != "plant_outliers"])))
    if "rotate_state" in chosen:
        chosen.add("expose_state")
    if "fold_norm" in chosen:
        chosen.discard("smooth_norm")
    first = ["plant_outliers"] if draw(st.booleans()) else []
    names = [*first, *(name for name in PASSES if name in chosen)]
    passes = tuple(PASSES[name](**draw(st.fixed_dictionaries(OPTIONS.get(name, {})))) for name in names)
    name = draw(st.text(min_size=1).filter(lambda text: text.strip() != "" and text.isprintable()))
    roles = st.sampled_from(Role)
    modules = draw(st.dictionaries(st.text(min_size=1), st.dictionaries(roles, st.none() | SPECS, min_size=1)))
    return Recipe(name, QuantizationConfig(draw(st.dictionaries(roles, SPECS, min_size=1))), passes, modules)


def test_the_drawn_options_are_all_there_are() -> None:
    assert {name: {field.name for field in fields(kind)} for name, kind in PASSES.items() if fields(kind)} == {
        name: set(options) for name, options in OPTIONS.items()
    }


@given(recipes())
def test_drawn_recipes_come_back_from_what_is_written(recipe: Recipe) -> None:
    assert from_dict(to_dict(recipe)) == recipe
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


@given(recipe=recipes())
@settings(deadline=None)  # writes files
def test_drawn_recipes_come_back_from_files(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("drawn") / "mine.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert get_recipe(path) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_files_say_what_the_recipe_says(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    (tmp_path / "mine.yaml").write_text(to_yaml(recipe))
    (tmp_path / "mine.JSON").write_text(json.dumps(to_dict(recipe)))
    assert get_recipe(str(tmp_path / "mine.yaml")) == recipe
    assert get_recipe(str(tmp_path / "mine.JSON")) == recipe
    assert read_recipe(tmp_path / "mine.JSON") == get_recipe(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "a recipe is .1.: give a mapping with modules, name, passes, scheme"),
        ({"passes": []}, "a recipe needs a scheme"),
        ({"scheme": {}, "steps": []}, "a recipe has no key steps: it has modules, name, passes, scheme"),
        ({"scheme": {"in_proj": {"bit": 4}}}, "role in_proj has no key bit: it has activation, activation_bits, bits"),
        ({"scheme": {"attention": {}}}, "unknown role 'attention': the roles are in_proj"),
        ({"scheme": {"attention": None}}, "unknown role 'attention': the roles are in_proj"),
        ({"scheme": {3: {}}}, "unknown role '3': the roles are in_proj"),
        ({"scheme": {"in_proj": {"bits": 2}}}, "weights have 8, 4 or 3 bits, not 2"),
        ({"scheme": {"in_proj": {"activation_bits": 3}}}, "activations have 8 or 4 bits, not 3"),
        (
            {"scheme": {"in_proj": {"activation_bits": 4}}},
            "activations of 4 bits need a scale a token: give activation per_token or per_group, not static",
        ),
        (
            {"scheme": {"in_proj": {"activation": "per_group"}}},
            "activation per_group takes the groups of the weights: give a group_size",
        ),
        (
            {"scheme": {"in_proj": {"activation": "fp8"}}},
            "activation is 'fp8': it is one of none, static, per_token, per_group",
        ),
        ({"scheme": {"in_proj": {"activation": None}}}, "activation is None: it is one of none, static, per_token"),
        (
            {"scheme": {"in_proj": {"range": ["min_max"]}}},
            "range is .*: it is one of histogram, min_max, moving_average",
        ),
        ({"scheme": {"in_proj": {"rounding": True}}}, "rounding is True: it is one of nearest, search, gptq"),
        ({"scheme": {"in_proj": {"group_size": 6}}}, "a group of weights has a multiple of 4 inputs, not 6"),
        ({"scheme": {"conv1d": False}}, "role conv1d is False: give a mapping with activation, activation_bits, bits"),
        ({"scheme": {"conv1d": []}}, r"role conv1d is \[\]: give a mapping with activation, activation_bits, bits"),
        ({"scheme": {"conv1d": 0}}, "role conv1d is 0: give a mapping with activation, activation_bits, bits"),
        ({"scheme": {"conv1d": ""}}, "role conv1d is '': give a mapping with activation, activation_bits, bits"),
        (
            {"scheme": {"conv1d": "static"}},
            "role conv1d is 'static': give a mapping with activation, activation_bits, bits",
        ),
        ({"scheme": {}}, "the scheme is empty: say how at least one role is quantized"),
        ({"scheme": {"conv1d": None}}, "the scheme is empty"),
        ({"scheme": None}, "the scheme is None: give a mapping from roles to their options"),
        ({"scheme": {"head": {}}, "modules": ["a"]}, "the modules are .'a'.: give a mapping from names to mappings"),
        ({"scheme": {"head": {}}, "modules": {"a": "float"}}, "the modules are .*: give a mapping from names to mapp"),
        ({"scheme": {"head": {}}, "modules": {"a": {}}}, "module a has .*: give a mapping from roles to specs"),
        ({"scheme": {"head": {}}, "modules": {"": {"head": None}}}, "a module is named '': give its qualified name"),
        ({"scheme": {"head": {}}, "modules": {3: {"head": None}}}, "a module is named 3: give its qualified name"),
        ({"scheme": {"head": {}}, "modules": {"a": {"heads": None}}}, "unknown role 'heads': the roles are in_proj"),
        ({"scheme": {"head": {}}, "modules": {"a": {"head": {"bits": 2}}}}, "weights have 8, 4 or 3 bits, not 2"),
        ({"scheme": {}, "passes": ["r1"]}, "unknown pass 'r1': the passes are fold_norm"),
        ({"scheme": {}, "passes": [{"smooth_gate": {"beta": 1}}]}, "pass smooth_gate has no option beta"),
        ({"scheme": {}, "passes": [{"smooth_gate": {1: 1}}]}, "pass smooth_gate has no option 1: it has alpha"),
        ({"scheme": {}, "passes": [{"fold_norm": {"alpha": 1}}]}, "pass fold_norm has no option alpha: it has none"),
        ({"scheme": {}, "passes": [{"smooth_gate": []}]}, r"the options of pass smooth_gate are \[\]: give a mapping"),
        (
            {"scheme": {}, "passes": [{"smooth_gate": False}]},
            "options of pass smooth_gate are False: give a mapping",
        ),
        ({"scheme": {}, "passes": "fold_norm"}, "the passes are 'fold_norm': give a list"),
        ({"scheme": {}, "passes": False}, "the passes are False: give a list"),
        ({"scheme": {}, "passes": {"fold_norm": None}}, "the passes are {'fold_norm': None}: give a list"),
        ({"scheme": {"in_proj": {}}, "name": ""}, "the name of a recipe is '': give one line of text"),
        ({"scheme": {"in_proj": {}}, "name": None}, "the name of a recipe is None: give one line of text"),
        ({"scheme": {"in_proj": {}}, "name": 8}, "the name of a recipe is 8: give one line of text"),
    ],
)
def test_mistakes_in_recipes_are_named(content: object, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        from_dict(content)


def test_null_leaves_a_role_in_float(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\nscheme: {in_proj: {}, conv1d: null, head:}\n")
    assert get_recipe(path) == Recipe("mine", QuantizationConfig({Role.IN_PROJ: RoleSpec()}))
    without = QuantizationConfig({"in_proj": RoleSpec(), "conv1d": None})
    assert without == QuantizationConfig({Role.IN_PROJ: RoleSpec()})
    assert str(without) == "in_proj    int8 weight, static 8-bit (histogram) input"
    assert Role.CONV1D not in w8a8().replaced(conv1d=None).roles


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.yaml", "scheme: [", "is not valid: while parsing"),
        ("bad.json", "{", "is not valid: Expecting property name"),
        ("bytes.yaml", "\udcff", "cannot be read: 'utf-8' codec can't decode"),
        ("key.yaml", "{[]: 1}", "is not valid: .* found unhashable key"),
        ("date.yaml", "name: 2026-13-01", "is not valid: month must be in 1..12"),
        ("tag.yaml", "!!python/x 1", "is not valid: could not determine a constructor"),
        ("twice.yaml", "scheme: {head: {}, head: {}}", ": head stands there twice: give it once"),
        ("twice.json", '{"scheme": {"head": {}, "head": 1}}', ": head stands there twice: give it once"),
        (
            "nan.json",
            '{"scheme": {}, "passes": [{"smooth_dt": {"alpha": NaN}}]}',
            ": option alpha of .* is nan: it is",
        ),
        ("recipe.txt", "scheme: {head: {}}", "has to end in .yaml, .yml, .json"),
    ],
)
def test_files_that_are_no_recipes(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MqAoError, match=f"recipe file .*{name} ?{message}"):
        get_recipe(tmp_path / name)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="missing.yaml cannot be read"):
        get_recipe(str(tmp_path / "missing.yaml"))
    (tmp_path / "folder.yml").mkdir()
    with pytest.raises(MqAoError, match="folder.yml cannot be read"):
        get_recipe(tmp_path / "folder.yml")
    wrong: list[Any] = ["best", "", None, 8, ["rtn-w8a8"]]
    for name in wrong:
        with pytest.raises(MqAoError, match="unknown recipe .*: the recipes are rtn-w8a8"):
            get_recipe(name)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.1, 1.1, 1e400, True, False, None, "0.5", [0.5], 1j]
)
@pytest.mark.parametrize(("name", "option"), SHARES)
def test_shares_are_numbers_from_0_to_1(name: str, option: str, value: Any) -> None:
    message = f"option {option} of pass {name} is .*: it is a number from 0 to 1"
    with pytest.raises(MqAoError, match=message):
        PASSES[name](**{option: value})
    with pytest.raises(MqAoError, match=message):
        from_dict({"scheme": {"head": {}}, "passes": [{name: {option: value}}]})
    assert [getattr(PASSES[name](**{option: right}), option) for right in (0, 0.25, 1)] == [0.0, 0.25, 1.0]


def test_there_are_shares_and_every_option_has_a_type_that_is_checked() -> None:
    assert {name for name, _ in SHARES} == {"smooth_norm", "smooth_gate", "smooth_dt", "smooth_conv", "plant_outliers"}
    for kind in PASSES.values():
        for field in fields(kind):
            with pytest.raises(MqAoError, match=f"option {field.name} of pass {kind.name} is <object"):
                kind(**{field.name: object()})


@pytest.mark.parametrize(("name", "option"), CHOICES)
def test_choices_are_names_or_members(name: str, option: str) -> None:
    for member in KINDS[option]:
        for given_as in (member, member.value):
            assert getattr(PASSES[name](**{option: given_as}), option) is member
    for wrong in ("fft", "", None, True, 1, [], math.nan):
        known = ", ".join(KINDS[option])
        with pytest.raises(MqAoError, match=f"option {option} of pass {name} is .*: it is one of {known}"):
            PASSES[name](**{option: wrong})


@pytest.mark.parametrize(
    "options", [{"factor": 0.5}, {"factor": 1e7}, {"factor": math.inf}, {"seed": -1}, {"seed": 1.0}, {"seed": True}]
)
def test_outliers_are_planted_within_reason(options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(MqAoError, match=f"option {option} of pass plant_outliers is .*: it is a .*number from"):
        PASSES["plant_outliers"](**options)


@pytest.mark.parametrize("bits", [8.0, True, "8", None, math.nan, [8], 0, 16])
def test_bits_are_whole_numbers(bits: Any) -> None:
    with pytest.raises(MqAoError, match="weights have 8, 4 or 3 bits, not"):
        RoleSpec(bits=bits)
    with pytest.raises(MqAoError, match="activations have 8 or 4 bits, not"):
        RoleSpec(Activation.PER_TOKEN, activation_bits=bits)


@pytest.mark.parametrize("size", [-1, 0, 1, 1.5, 64.0, True, "64", math.inf, [64]])
def test_groups_are_whole_numbers(size: Any) -> None:
    with pytest.raises(MqAoError, match="a group of weights has at least 4 inputs, not"):
        RoleSpec(bits=4, group_size=size)


@pytest.mark.parametrize("spec", [False, 0, "static", {}, Activation.STATIC, RoleSpec])
def test_specs_are_specs(spec: Any) -> None:
    with pytest.raises(MqAoError, match=r"the spec of head is .*: give a RoleSpec, or None"):
        QuantizationConfig({Role.HEAD: spec})
    with pytest.raises(MqAoError, match=r"the spec of head is .*: give a RoleSpec, or None"):
        w8a8().replaced(head=spec)


def test_schemes_are_mappings_of_known_roles() -> None:
    for roles in (None, [Role.HEAD], "head"):
        with pytest.raises(MqAoError, match="the roles are .*: give a mapping from roles to specs"):
            QuantizationConfig(roles)
    for role in ("heads", None, 3, True):
        for spec in (RoleSpec(), None):
            with pytest.raises(MqAoError, match="unknown role '.*': the roles are in_proj"):
                QuantizationConfig({role: spec})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "the name of a recipe is ''"),
        ({"name": " "}, "the name of a recipe is ' '"),
        ({"name": "two\nlines"}, "give one line of text"),
        ({"name": None}, "the name of a recipe is None"),
        ({"name": 8}, "the name of a recipe is 8"),
        ({"scheme": None}, "the scheme is None: give a QuantizationConfig"),
        ({"scheme": {"head": RoleSpec()}}, "the scheme is {.*}: give a QuantizationConfig"),
        ({"scheme": QuantizationConfig()}, "the scheme is empty"),
        ({"scheme": QuantizationConfig({"conv1d": None})}, "the scheme is empty"),
        ({"passes": None}, "the passes are None: give a sequence of passes"),
        ({"passes": "fold_norm"}, "the passes are 'fold_norm': give a sequence of passes"),
        ({"passes": SmoothGate()}, "the passes are SmoothGate.*: give a sequence of passes"),
        ({"passes": ("r1",)}, "unknown pass 'r1': the passes are fold_norm"),
        ({"passes": (SmoothGate,)}, "unknown pass <class .*: the passes are fold_norm"),
        ({"passes": (None,)}, "unknown pass None"),
        ({"passes": ("smooth_gate", SmoothGate(0.3))}, "pass smooth_gate stands there twice: give each pass once"),
    ],
)
def test_mistakes_in_python_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        Recipe(**({"name": "mine"} | change))


def test_passes_are_a_tuple_whatever_they_were_given_as() -> None:
    wanted = Recipe("mine", passes=(SmoothGate(0.25), RotateDt(Basis.HADAMARD)))
    for written in (
        [SmoothGate(0.25), RotateDt("hadamard")],
        [{"smooth_gate": {"alpha": 0.25}}, {"rotate_dt": {"basis": "hadamard"}}],
    ):
        assert Recipe("mine", passes=written) == wanted
    assert Recipe("mine", passes=["fold_norm"]).passes == (PASSES["fold_norm"](),)
    assert [parse_pass(written) for written in ({"smooth_gate": None}, {"smooth_gate": {}})] == [SmoothGate()] * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("fold_norm fold_norm", "pass fold_norm stands there twice"),
        ("rotate_residual fold_norm", "pass fold_norm stands after rotate_residual: put it before rotate_residual"),
        ("rotate_out_proj smooth_gate", "pass smooth_gate stands after rotate_out_proj: put it before"),
        ("rotate_dt rotate_out_proj smooth_dt", "pass smooth_dt stands after rotate_dt: put it before"),
        ("rotate_dt shift_dt", "pass shift_dt stands after rotate_dt: put it before"),
        ("expose_state shift_dt", "pass shift_dt stands after expose_state: put it before"),
        ("expose_state smooth_state", "pass smooth_state stands after expose_state: put it before"),
        ("rotate_state", "pass rotate_state needs expose_state: put expose_state before it"),
        ("rotate_state expose_state", "pass rotate_state needs expose_state: put expose_state before it"),
        ("fold_norm smooth_norm", "passes fold_norm and smooth_norm do not go together"),
        ("smooth_norm fold_norm", "passes fold_norm and smooth_norm do not go together"),
        ("smooth_dt plant_outliers", "pass plant_outliers stands after smooth_dt: put it first"),
    ],
)
def test_orders_that_make_no_sense(names: str, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        Recipe("mine", passes=names.split())
    with pytest.raises(MqAoError, match=message):
        check_order(names.split())


def test_a_pass_of_ones_own_may_stand_anywhere_and_its_options_are_its_own() -> None:
    assert Recipe("mine", passes=["rotate_dt", Mine((1, 2)), "rotate_out_proj"]).passes[1] == Mine((1, 2))


@dataclass(frozen=True)
class Mine(Pass):
    """A pass that is not in the registry."""

    name = "mine"

    sizes: tuple[int, ...] = ()

    def apply(self, rewrite: Any) -> None:
        """Does nothing."""
