"""What a recipe is: ordered exact rewrites, then a quantization scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mq_ao.errors import MqAoError
from mq_ao.passes import Pass, check_order, parse_pass
from mq_ao.passes.registry import write_pass
from mq_ao.quantizer import QuantizationConfig, w8a8


@dataclass(frozen=True)
class Recipe:
    """How a float graph becomes a quantized one.

    Attributes:
        name: what reports and saved programs call it, one line of text.
        scheme: spec of every role that is quantized.
        passes: exact float rewrites, or their names, in the order in which they are applied.

    Raises:
        MqAoError: an attribute is not as above, the scheme quantizes nothing, or the passes do not go together in this
            order (see `check_order`).
    """

    name: str
    scheme: QuantizationConfig = field(default_factory=w8a8)
    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or not self.name.isprintable():
            raise MqAoError(f"the name of a recipe is {self.name!r}: give one line of text.")
        if not isinstance(self.scheme, QuantizationConfig):
            raise MqAoError(f"the scheme is {self.scheme!r}: give a QuantizationConfig.")
        if not isinstance(self.passes, Sequence) or isinstance(self.passes, str):
            raise MqAoError(f"the passes are {self.passes!r}: give a sequence of passes.")
        object.__setattr__(self, "passes", tuple(map(parse_pass, self.passes)))
        check_order([item.name for item in self.passes])
        if not self.scheme.roles:
            raise MqAoError("the scheme is empty: say how at least one role is quantized.")

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data is run through the float graph before it is prepared."""
        return bool(self.passes) or self.scheme.needs_statistics

    def __str__(self) -> str:
        """A table: the passes with their options, then the scheme by role."""
        lines = [f"recipe {self.name}"]
        for index, item in enumerate(self.passes):
            lines.append(f"{'passes' if index == 0 else '':<10} {_in_words(item)}")
        return "\n".join([*lines, str(self.scheme)])


def _in_words(item: Pass) -> str:
    written = write_pass(item)
    options = next(iter(written.values())) if isinstance(written, dict) else {}
    step = f" ({item.step})" if item.step else ""
    return item.name + step + "".join(f" {name}={value}" for name, value in options.items())
