"""What a recipe is: ordered exact rewrites, then a quantization scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.passes import Pass, check_order, parse_pass
from mq_ao.passes.registry import write_pass
from mq_ao.quantizer import MambaQuantizer, QuantizationConfig, RoleSpec, w8a8
from mq_ao.quantizer.specs import in_words

Roles = Mapping[Role, RoleSpec | None]
"""Specs by role; None leaves a role in float."""


@dataclass(frozen=True)
class Recipe:
    """How a float graph becomes a quantized one.

    Attributes:
        name: what reports and saved programs call it, one line of text.
        scheme: spec of every role that is quantized.
        passes: exact float rewrites, or their names, in the order in which they are applied.
        modules: specs by role for what lies inside of a module, by its qualified name, instead of those of the scheme;
            None leaves a role in float there. Of modules inside of each other the innermost has its say.

    Raises:
        MqAoError: an attribute is not as above, the scheme quantizes nothing, or the passes do not go together in this
            order (see `check_order`).
    """

    name: str
    scheme: QuantizationConfig = field(default_factory=w8a8)
    passes: tuple[Pass, ...] = ()
    modules: Mapping[str, Roles] = field(default_factory=dict)

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
        object.__setattr__(self, "modules", _checked(self.modules))

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data is run through the float graph before it is prepared."""
        return bool(self.passes) or any(scheme.needs_statistics for scheme in self.schemes)

    @property
    def schemes(self) -> Iterator[QuantizationConfig]:
        """The scheme, and what it comes to inside of each module."""
        yield self.scheme
        yield from map(self._inside, self.modules)

    def quantizer(self, backend: str) -> MambaQuantizer:
        """What annotates a rewritten graph for a backend, see `mq_ao.backends.BACKENDS`.

        Raises:
            MqAoError: unknown backend, or a spec that it has no kernel for.
        """
        quantizer = MambaQuantizer(backend).set_global(self.scheme)
        for name in self.modules:
            quantizer.set_module_name(name, self._inside(name))
        return quantizer

    def _inside(self, name: str) -> QuantizationConfig:
        return self.scheme.replaced(**{str(role): spec for role, spec in self.modules[name].items()})

    def __str__(self) -> str:
        """A table: the passes with their options, then the scheme by role, then modules that differ from it."""
        lines = [f"recipe {self.name}"]
        for index, item in enumerate(self.passes):
            lines.append(f"{'passes' if index == 0 else '':<10} {_in_words(item)}")
        lines.append(str(self.scheme))
        for name, roles in self.modules.items():
            lines += [
                f"{role:<10} {in_words(role, spec) if spec else 'float'}, in {name}" for role, spec in roles.items()
            ]
        return "\n".join(lines)


def _checked(modules: object) -> Mapping[str, Roles]:
    if not isinstance(modules, Mapping):
        raise MqAoError(f"the modules are {modules!r}: give a mapping from their names to specs by role.")
    found: dict[str, Roles] = {}
    for name, roles in modules.items():
        if not isinstance(name, str) or not name:
            raise MqAoError(f"a module is named {name!r}: give its qualified name, such as backbone.layers.0.")
        if not isinstance(roles, Mapping) or not roles:
            raise MqAoError(f"module {name} has {roles!r}: give a mapping from roles to specs.")
        parsed = {Role.parse(role): spec for role, spec in roles.items()}
        QuantizationConfig(parsed)  # which checks the specs
        found[name] = MappingProxyType(parsed)
    return MappingProxyType(found)


def _in_words(item: Pass) -> str:
    written = write_pass(item)
    options = next(iter(written.values())) if isinstance(written, dict) else {}
    step = f" ({item.step})" if item.step else ""
    return item.name + step + "".join(f" {name}={value}" for name, value in options.items())
