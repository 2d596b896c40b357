"""Recipes as YAML or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mq_ao.errors import MqAoError
from mq_ao.passes import parse_pass
from mq_ao.passes.registry import write_pass
from mq_ao.quantizer import QuantizationConfig, RoleSpec
from mq_ao.recipes import Recipe

_DEFAULT = RoleSpec()


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        MqAoError: the file is missing or is not a recipe; unknown keys are named.
    """
    path = Path(path)
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise MqAoError(f"recipe file {path} cannot be read: {error}.") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise MqAoError(f"recipe file {path} is not valid: {' '.join(str(error).split())}.") from error
    try:
        return from_dict(content, path.stem)
    except MqAoError as error:
        raise MqAoError(f"recipe file {path}: {error}") from error


def from_dict(content: Any, name: str = "recipe") -> Recipe:
    """A recipe from plain data: `{"name", "passes": [...], "scheme": {role: {option: value}}}`.

    Args:
        content: what `to_dict` gives.
        name: for a recipe without one.

    Raises:
        MqAoError: a key, a pass, a role or a value is unknown.
    """
    _check_keys(content, {"name", "passes", "scheme"}, "a recipe")
    if "scheme" not in content:
        raise MqAoError("a recipe needs a scheme: say under `scheme` how each role is quantized.")
    scheme = content["scheme"]
    if not isinstance(scheme, Mapping):
        raise MqAoError(f"the scheme is {scheme!r}: give a mapping from roles to their options.")
    passes = content.get("passes") or []
    if not isinstance(passes, list):
        raise MqAoError(f"the passes are {passes!r}: give a list.")
    roles = {role: _spec(role, options or {}) for role, options in scheme.items()}
    return Recipe(str(content.get("name", name)), QuantizationConfig(roles), tuple(map(parse_pass, passes)))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data that `from_dict` reads; options that have their default are left out."""
    scheme = {
        str(role): {
            key: getattr(value, "value", value) for key, value in vars(spec).items() if value != getattr(_DEFAULT, key)
        }
        for role, spec in recipe.scheme.roles.items()
    }
    return {"name": recipe.name, "passes": [write_pass(item) for item in recipe.passes], "scheme": scheme}


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML document."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def _spec(role: Any, options: Any) -> RoleSpec:
    _check_keys(options, set(vars(_DEFAULT)), f"role {role}")
    return RoleSpec(**options)


def _check_keys(content: Any, known: set[str], what: str) -> None:
    if not isinstance(content, Mapping):
        raise MqAoError(f"{what} is {content!r}: give a mapping with {', '.join(sorted(known))}.")
    unknown = {str(key) for key in content} - known
    if unknown:
        raise MqAoError(f"{what} has no key {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}.")
