"""Statistics of a float graph's values over calibration data, which rewrites and quantizer are computed from."""

from __future__ import annotations

from mq_ao.statistics.channels import ChannelStatistics, Request, Statistics
from mq_ao.statistics.collecting import collect, shard

__all__ = ["ChannelStatistics", "Request", "Statistics", "collect", "shard"]
