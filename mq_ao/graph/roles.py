"""The roles that nodes play in a Mamba graph."""

from __future__ import annotations

from enum import StrEnum

from mq_ao.errors import MqAoError


class Role(StrEnum):
    """Name of a quantizable part of a Mamba model, as mamba_ssm calls it where it has a name."""

    IN_PROJ = "in_proj"
    CONV1D = "conv1d"
    X_PROJ = "x_proj"
    DT_PROJ = "dt_proj"
    OUT_PROJ = "out_proj"
    LINEAR = "linear"
    """Any linear outside Mamba blocks but the head: patch embeddings, attention, MLPs, experts."""
    HEAD = "head"
    EMBEDDING = "embedding"
    SCAN = "scan"
    """The scan's operands u, delta (before softplus), B and C."""
    GATE = "gate"
    """The gate's operands: the scan's output y, and z before its activation."""
    STATE = "state"
    """h and C where they are multiplied, if that is a node of its own (pass `expose_state`)."""
    CARRIED_STATE = "carried_state"
    """The scan's state where a graph takes it as an input and gives it back as an output."""
    KV_CACHE = "kv_cache"
    """Keys and values of attention where a graph takes those of the tokens before, and gives new ones."""

    @classmethod
    def parse(cls, name: str | Role) -> Role:
        """Returns the role of that name.

        Raises:
            MqAoError: there is none; the message lists the known ones.
        """
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(role.value for role in cls)
            raise MqAoError(f"unknown role {str(name)!r}: the roles are {known}.") from None
