"""What the quantizer did with every node it looked at."""

from __future__ import annotations

from dataclasses import dataclass

from mq_ao.graph import Role


@dataclass(frozen=True)
class Decision:
    """One node, accepted or rejected.

    Attributes:
        node: name of the node.
        module: qualified name of the submodule it came from ("" if unknown).
        role: its role, or None where it has none.
        accepted: whether it is quantized.
        detail: the spec in words, or the reason.
    """

    node: str
    module: str
    role: Role | None
    accepted: bool
    detail: str


@dataclass(frozen=True)
class QuantizationReport:
    """All decisions of one `annotate`, in graph order."""

    decisions: tuple[Decision, ...]

    @property
    def accepted(self) -> tuple[Decision, ...]:
        """The quantized nodes."""
        return tuple(decision for decision in self.decisions if decision.accepted)

    @property
    def rejected(self) -> tuple[Decision, ...]:
        """The nodes left in float."""
        return tuple(decision for decision in self.decisions if not decision.accepted)

    def __str__(self) -> str:
        """Accepted nodes counted by role and spec, then what was rejected and why."""
        counts: dict[tuple[str, str], int] = {}
        for decision in self.accepted:
            key = (str(decision.role), decision.detail)
            counts[key] = counts.get(key, 0) + 1
        lines = [f"{len(self.accepted)} nodes quantized, {len(self.rejected)} left in float"]
        lines += [f"  {role:<10} x {count:<3} {detail}" for (role, detail), count in counts.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for item in self.rejected:
            reasons.setdefault((str(item.role or "no role"), item.detail), []).append(item.node)
        for (role, reason), nodes in reasons.items():
            what = nodes[0] if len(nodes) == 1 else f"x {len(nodes)}"
            lines.append(f"  left out   {role} {what}: {reason}")
        return "\n".join(lines)
