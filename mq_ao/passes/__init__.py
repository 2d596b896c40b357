"""Exact float rewrites (docs/method.md), applied between capture and `prepare_pt2e`, and the statistics they need."""

from __future__ import annotations

from mq_ao.passes.apply import apply
from mq_ao.passes.base import Pass, Profile, Rewrite, Status, Transform
from mq_ao.passes.klt import Basis
from mq_ao.passes.order import check_order
from mq_ao.passes.registry import PASSES, parse_pass
from mq_ao.statistics import ChannelStatistics, Request, Statistics, collect

__all__ = [
    "PASSES",
    "Basis",
    "ChannelStatistics",
    "Pass",
    "Profile",
    "Request",
    "Rewrite",
    "Statistics",
    "Status",
    "Transform",
    "apply",
    "check_order",
    "collect",
    "parse_pass",
]
