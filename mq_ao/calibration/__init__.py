"""Calibration data: read as people have it, without padding, and run through a graph."""

from __future__ import annotations

from mq_ao.calibration.inputs import Calibration
from mq_ao.calibration.run import calibrate

__all__ = ["Calibration", "calibrate"]
