"""Reading and editing exported graphs: roles, walks, the block matcher, node insertion."""

from __future__ import annotations

from mq_ao.graph.block import Block, Direction
from mq_ao.graph.matcher import Match, Rejection, match
from mq_ao.graph.roles import Role

__all__ = ["Block", "Direction", "Match", "Rejection", "Role", "match"]
