"""What a captured graph assumes of the sizes of its inputs, as text that a saved program can hold and check.

torch.export writes its assumptions as Python, for example `L['x'].size()[1] % 4 == 0`. They are arithmetic on sizes and
nothing else, and that is all that is read here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType

from mq_ao.errors import MqAoError

_SIZE = re.compile(r"L\['inputs'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_ARITHMETIC = (
    ast.Expression,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.Not,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
    ast.Mod,
    ast.UnaryOp,
    ast.USub,
    ast.Compare,
    ast.cmpop,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Call,
)
_FUNCTIONS = {"max": max, "min": min}


@dataclass(frozen=True)
class Guard:
    """One assumption.

    Attributes:
        text: an expression of sizes, which are named `size_INPUT_AXIS`.
    """

    text: str

    @classmethod
    def of(cls, exported: str) -> Guard:
        """From what torch.export wrote of a graph whose one argument is the tuple `inputs`.

        Raises:
            MqAoError: it is more than arithmetic on sizes.
        """
        guard = cls(_SIZE.sub(r"size_\1_\2", exported))
        guard._code  # noqa: B018  (raises)
        return guard

    def holds(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether inputs of these shapes are as assumed."""
        sizes = {f"size_{index}_{axis}": size for index, shape in enumerate(shapes) for axis, size in enumerate(shape)}
        try:
            return bool(eval(self._code, {"__builtins__": {}, **_FUNCTIONS}, sizes))
        except ZeroDivisionError:
            return False

    def described(self, names: Mapping[int, str]) -> str:
        """For people; `names` are the inputs'."""
        return re.sub(r"size_(\d+)_(\d+)", lambda at: f"{names[int(at[1])]}.shape[{at[2]}]", self.text)

    @cached_property
    def _code(self) -> CodeType:
        """Checked, since it comes from a file."""
        unknown = MqAoError(
            f"the sizes of this model's inputs depend on each other as {self.text!r}, which a saved program cannot "
            "check: capture it with fixed sizes."
        )
        try:
            tree = ast.parse(self.text, mode="eval")
        except SyntaxError:
            raise unknown from None
        for node in ast.walk(tree):
            known = isinstance(node, _ARITHMETIC)
            if isinstance(node, ast.Call):
                known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
            elif isinstance(node, ast.Name):
                known = node.id in _FUNCTIONS or re.fullmatch(r"size_\d+_\d+", node.id) is not None
            elif isinstance(node, ast.Constant):
                known = isinstance(node.value, int)
            if not known:
                raise unknown
        return compile(tree, "<guard>", "eval")
