"""The operators' schemas, which saved programs, C++ kernels and rewriters rely on: none changes by accident."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import mq_ao.ops  # noqa: F401

FROZEN = Path(__file__).with_name("schemas.txt")


def _text(schema: Any) -> str:
    """A schema but for the names of its results, which nothing reads."""
    arguments, arrow, results = str(schema).rpartition(" -> ")
    return arguments + arrow + re.sub(r"(Tensor(\(\w!\))?) \w+", r"\1", results)


def schemas() -> list[str]:
    """All schemas of ours but those of references, which are the operators' own."""
    ours = [_text(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("mq_ao::")]
    return sorted(text for text in ours if not text.partition("(")[0].endswith("_reference"))


def test_no_schema_has_changed() -> None:
    """After a change that is meant, `python -m tests.test_schemas > tests/schemas.txt` freezes what there is then."""
    assert schemas() == FROZEN.read_text().splitlines()


def test_references_have_the_schemas_of_their_operators() -> None:
    names = [text.removeprefix("mq_ao::").partition("(")[0] for text in schemas()]
    for name in [name for name in names if "." not in name]:
        operator, reference = (getattr(torch.ops.mq_ao, which).default for which in (name, f"{name}_reference"))
        assert _text(reference._schema) == _text(operator._schema).replace(f"::{name}(", f"::{name}_reference(")


if __name__ == "__main__":
    print(*schemas(), sep="\n")
