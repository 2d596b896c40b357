"""Imports between rooms go one way, and no two files import each other in a circle, functions' imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOMES = {"mq_ao": ROOT / "mq_ao", "mq_ao.quantizer": ROOT / "quantizer", "mq_ao.lowering": ROOT / "lowering"}

ANYWHERE = "arrays backends compat errors extras checks files logs memory modes progress tokenizer turns version"
"""Files that know nothing of models and graphs: all may import them, and they import none of ours but `errors`."""
GRAPHS = "ops graph statistics passes quantizer"
MAY_IMPORT = {
    "ops": "",
    "models": "ops",
    "graph": "ops",
    "capture": "ops graph",
    "calibration": "graph models",
    "statistics": "ops graph",
    "passes": "ops graph statistics",
    "quantizer": "ops graph statistics",
    "lowering": "ops graph models quantizer",
    "recipe": GRAPHS,
    "recipe_files": f"{GRAPHS} recipe",
    "recipes": f"{GRAPHS} recipe recipe_files",
    "report": f"{GRAPHS} lowering recipe",
    "text": "",
    "plots": "",
    "classify": "",
    "evaluate": "models text",
    "checkout": "",
    "scoring": "models",
    "opening": "ops models lowering api loading text",
    "writing": "models opening text",
    "serving": "models opening text writing",
    "integrations": f"{GRAPHS} models capture lowering recipe recipes quantized api "
    "evaluate loading opening scoring text writing",
    "quantized": "models lowering report",
    "prepared": "report quantized",
    "rewritten": "graph statistics quantizer calibration recipe report prepared",
    "training": "ops graph quantizer lowering prepared quantized",
    "api": f"{GRAPHS} models capture calibration lowering recipes report quantized prepared rewritten training",
    "loading": "models lowering",
    "mq_ao": "api capture checkout loading",
    "roofline": f"{GRAPHS} models calibration lowering recipes api plots",
    "measuring": f"{GRAPHS} models recipe recipes quantized api evaluate text",
    "budget": f"{GRAPHS} models lowering recipe recipes quantized rewritten training api measuring plots",
    "ablation": f"{GRAPHS} recipes measuring plots",
    "bench": "ops models lowering loading recipes api text",
    "gpu_check": "ops models lowering recipes api text classify evaluate roofline bench",
    "cli": f"{GRAPHS} models lowering recipe_files recipes quantized api text classify evaluate roofline "
    "measuring budget ablation plots bench gpu_check loading opening writing integrations serving",
    "__main__": "cli",
}
"""What else every other room, a folder or a file of `mq_ao`, may import; "mq_ao" is the package's own `__init__`."""


def files() -> dict[str, Path]:
    found = {}
    for package, home in HOMES.items():
        for path in home.rglob("*.py"):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


FILES = files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def froms(module: str) -> Iterator[tuple[str, ast.alias]]:
    """Every `from X import Y` of a file, as X and Y; X may be anything that is installed."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} imports relative to itself"
            yield from ((node.module, alias) for alias in node.names)


def definer(module: str, name: str) -> str:
    """The file that `from module import name` reads: of a submodule, or where a package has the name from."""
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if module in FILES and FILES[module].name == "__init__.py":
        for source, alias in froms(module):
            if (alias.asname or alias.name) == name and source in FILES:
                return definer(source, alias.name)
    return module


def imports(module: str) -> set[str]:
    """The files of ours that a file imports; that Python runs the `__init__` of their packages first is not counted."""
    plain = (alias.name for node in ast.walk(TREES[module]) if isinstance(node, ast.Import) for alias in node.names)
    return {*plain, *(definer(source, alias.name) for source, alias in froms(module))} & FILES.keys()


IMPORTS = {module: imports(module) for module in FILES}


def room(module: str) -> str:
    return [*module.split("."), "mq_ao"][1]


def test_every_import_goes_to_a_room_below() -> None:
    low = {*ANYWHERE.split()}
    order = {name: {*allowed.split(), *low} for name, allowed in MAY_IMPORT.items()}
    order |= {name: {"errors"} - {name} for name in low}
    TopologicalSorter(order).prepare()  # raises CycleError if the table itself goes in a circle
    assert {room(module) for module in FILES} == order.keys()
    assert not [
        f"{module} imports {imported}"
        for module, found in IMPORTS.items()
        for imported in found
        if room(imported) not in order[room(module)] | {room(module)}
    ]


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the files
