"""Private names of PyTorch stand in one place, and do what is counted on."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import struct
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor, nn
from torch.export import Dim

from mq_ao.compat import compiling, graph_constants, trees
from mq_ao.compat.executorch import deserialize_pte_binary
from mq_ao.compat.observers import AffineQuantizedPlaceholderObserver
from mq_ao.compat.operators import is_fake, parse_schema
from mq_ao.compat.tracing import REFUSALS, FakeTensorMode, size_checks, size_guards

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchao", "executorch", "transformers", "mamba_ssm")
PUBLIC = {"torch._check", "torch._int_mm"}
"""Documented, in spite of their names."""


def private(tree: ast.AST) -> list[str]:
    """Names with a private part that a file reads of these packages."""
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    ]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    read = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        name
        for name in imported + read
        if name.partition(".")[0] in PACKAGES
        and not name.startswith("torch.ops.")
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        and name not in PUBLIC
    ]


def test_private_names_stand_in_compat_alone() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("mq_ao", "quantizer", "lowering")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent != ROOT / "mq_ao" / "compat"
        for name in private(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


def minor(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


@pytest.mark.parametrize("package", ["torch", "torchao", "executorch"])
def test_versions_end_with_those_that_were_checked(package: str) -> None:
    """Of private names nothing is promised, so a later minor version is admitted once it was checked, not before."""
    pinned = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = [item.specifier for items in listed for item in map(Requirement, items) if item.name == package]
    assert bounds
    for admitted in bounds:
        major, last = minor(pinned[1])
        assert pinned[1] in admitted and f"{major}.{last}.99" in admitted
        assert f"{major}.{last + 1}.0" not in admitted and f"{major + 1}.0.0" not in admitted
        with suppress(importlib.metadata.PackageNotFoundError):
            here = importlib.metadata.version(package)
            assert here in admitted, f"{package} {here}: once all tests pass with it, admit it in pyproject.toml"


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"y": x.unflatten(1, (2, -1)).sum(1) * (self.weight * 2 + 1) * scale}


def test_an_exported_graph_tells_its_structure_and_the_sizes_that_it_assumes() -> None:
    shapes = {"x": {1: Dim.AUTO}, "scale": None}
    call = ((torch.ones(2, 4, 3),), {"scale": torch.ones(())})
    program = torch.export.export(Halved().eval(), *call, dynamic_shapes=shapes)
    assert any("% 2" in guard or "2*" in guard for guard in size_guards(program)), size_guards(program)
    structure = trees.call_structure(program.module(check_guards=False))
    assert structure.orig_args == ["x", "scale"]
    assert trees.treespec_loads(trees.treespec_dumps(structure.out_spec)) == structure.out_spec
    assert trees.tree_unflatten([1], structure.out_spec) == {"y": 1}


def test_an_exported_graph_checks_the_sizes_of_its_inputs() -> None:
    shapes = {"x": {1: Dim.AUTO}, "scale": None}
    program = torch.export.export(
        Halved().eval(), (torch.ones(2, 4, 3),), {"scale": torch.ones(())}, dynamic_shapes=shapes
    )
    module = program.module()
    (check,) = size_checks(module)
    assert list(check.args) == module.graph.find_nodes(op="placeholder")
    with pytest.raises(AssertionError, match="Guard failed"):
        module(torch.ones(2, 5, 3), scale=torch.ones(()))
    assert size_checks(program.module(check_guards=False)) == []


def test_constants_fold() -> None:
    module = torch.export.export(Halved().eval(), (torch.ones(2, 4, 3),), {"scale": torch.ones(())}).module()
    assert isinstance(module, torch.fx.GraphModule)
    before = len(module.graph.nodes)
    compiling.constant_fold(module.requires_grad_(False), lambda node: True)
    assert len(module.graph.nodes) < before


def test_constants_have_dotted_names() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    assert graph_constants.attribute(module, "0.0.weight") is module[0][0].weight


def test_the_observer_of_dynamic_ranges_takes_what_it_is_given() -> None:
    from torchao.quantization.pt2e.observer import MappingType, PerToken

    observer = AffineQuantizedPlaceholderObserver(
        mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerToken()
    )
    assert torch.equal(observer(torch.ones(2, 3)), torch.ones(2, 3))


def test_settings_hold_in_their_context_alone() -> None:
    before = torch._inductor.config.freezing, torch._dynamo.config.recompile_limit
    with compiling.inductor_settings(freezing=not before[0]), compiling.dynamo_settings(recompile_limit=77):
        assert (torch._inductor.config.freezing, torch._dynamo.config.recompile_limit) == (not before[0], 77)
    assert (torch._inductor.config.freezing, torch._dynamo.config.recompile_limit) == before


def test_tensors_without_values_are_told() -> None:
    with FakeTensorMode():
        assert is_fake(torch.ones(2))
    assert not is_fake(torch.ones(2))


def test_schemas_have_arguments_with_defaults() -> None:
    schema = parse_schema("mq_ao::f(Tensor(a!) x, float s=0.5) -> Tensor")
    assert [argument.name for argument in schema.arguments] == ["x", "s"]
    assert schema.arguments[1].default_value == 0.5
    assert schema.arguments[0].alias_info.is_write


def test_refusals_of_export_are_those_that_it_raises() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(REFUSALS):
        torch.export.export(Branching().eval(), (torch.ones(2),))


def test_the_reader_of_program_files_says_what_is_missing() -> None:
    if importlib.util.find_spec("executorch") is None:
        with pytest.raises(ModuleNotFoundError):
            deserialize_pte_binary(b"")
        return
    with pytest.raises(struct.error):
        deserialize_pte_binary(b"no program")
