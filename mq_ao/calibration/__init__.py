"""Calibration data: read as people have it, without padding, and run through a graph."""

from __future__ import annotations

from mq_ao.calibration.calibrate import calibrate
from mq_ao.calibration.graph_inputs import Calibration

__all__ = ["Calibration", "calibrate"]
