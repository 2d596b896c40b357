"""Recipes as YAML or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.passes.registry import write_pass
from mq_ao.quantizer import QuantizationConfig, RoleSpec
from mq_ao.recipe import Recipe

SUFFIXES = (".yaml", ".yml", ".json")
"""Of recipe files."""
_DEFAULT = RoleSpec()


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error, as it should be and is not in pyyaml."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping."""
        _check_different([self.construct_object(key, deep=True) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        MqAoError: the file is missing or is not a recipe; unknown keys are named.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise MqAoError(f"recipe file {path} has to end in {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            content = json.loads(text, object_pairs_hook=_pairs)
        else:
            content = yaml.load(text, _Loader)
        return from_dict(content, path.stem)
    except MqAoError as error:
        raise MqAoError(f"recipe file {path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MqAoError(f"recipe file {path} cannot be read: {error}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise MqAoError(f"recipe file {path} is not valid: {' '.join(str(error).split())}.") from error


def from_dict(content: Any, name: str = "recipe") -> Recipe:
    """A recipe from plain data: `{"name", "passes": [...], "scheme": {role: {option: value}}, "modules": {name: ...}}`.

    Roles that are not in the scheme, or are None, stay in float; `{}` is the default of every option. Under `modules`,
    which may be left out, roles of a module that differ from the scheme have their options, or None for float.

    Args:
        content: what `to_dict` gives.
        name: for a recipe without one.

    Raises:
        MqAoError: a key, a pass, a role or a value is unknown, or they make no recipe (see `Recipe`).
    """
    _check_keys(content, {"name", "passes", "scheme", "modules"}, "a recipe")
    if "scheme" not in content:
        raise MqAoError("a recipe needs a scheme: say under `scheme` how each role is quantized.")
    scheme = content["scheme"]
    if not isinstance(scheme, Mapping):
        raise MqAoError(f"the scheme is {scheme!r}: give a mapping from roles to their options.")
    passes = content.get("passes")
    if passes is not None and not isinstance(passes, list | tuple):
        raise MqAoError(f"the passes are {passes!r}: give a list.")
    modules = content.get("modules")
    if modules is not None and not (
        isinstance(modules, Mapping) and all(isinstance(x, Mapping) for x in modules.values())
    ):
        raise MqAoError(f"the modules are {modules!r}: give a mapping from names to mappings from roles to options.")
    inside = {module: _specs(roles) for module, roles in (modules or {}).items()}
    config = QuantizationConfig().replaced(**_specs(scheme))
    return Recipe(content.get("name", name), config, tuple(passes or ()), inside)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data that `from_dict` reads; options that have their default are left out."""
    written = {
        "name": recipe.name,
        "passes": [write_pass(item) for item in recipe.passes],
        "scheme": {role.value: _options(spec) for role, spec in recipe.scheme.roles.items()},
    }
    if recipe.modules:
        written["modules"] = {
            name: {role.value: _options(spec) if spec else None for role, spec in roles.items()}
            for name, roles in recipe.modules.items()
        }
    return written


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML document."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _options(spec: RoleSpec) -> dict[str, Any]:
    """What differs from the defaults."""
    return {key: getattr(value, "value", value) for key, value in vars(spec).items() if value != getattr(_DEFAULT, key)}


def _specs(roles: Mapping[Any, Any]) -> dict[Role, RoleSpec | None]:
    return {Role.parse(role): _spec(role, options) for role, options in roles.items()}


def _spec(role: Any, options: Any) -> RoleSpec | None:
    if options is None:
        return None
    _check_keys(options, set(vars(_DEFAULT)), f"role {role}")
    return RoleSpec(**options)


def _pairs(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    _check_different([key for key, _ in items])
    return dict(items)


def _check_different(keys: list[Any]) -> None:
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise MqAoError(f"{twice} stands there twice: give it once.")


def _check_keys(content: Any, known: set[str], what: str) -> None:
    if not isinstance(content, Mapping):
        raise MqAoError(f"{what} is {content!r}: give a mapping with {', '.join(sorted(known))}.")
    unknown = {str(key) for key in content} - known
    if unknown:
        raise MqAoError(f"{what} has no key {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}.")
