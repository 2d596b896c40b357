"""Bytes and operations of every lowered node, against a device's peaks.

For GPUs times are predicted (`predict`): nothing of that was run on one, and nothing is fitted to measurements. For the
CPU that this runs on, times and peaks are measured (`measured`, `machine`).
"""

from __future__ import annotations

from mq_ao.roofline.cost import Cost
from mq_ao.roofline.devices import DEVICES, Device, get_device
from mq_ao.roofline.extrapolate import Counts, count, count_model
from mq_ao.roofline.lowered import at_run_time, float_graph, integer_graph, random_model
from mq_ao.roofline.predict import Line, Prediction, predict
from mq_ao.roofline.shapes import SHAPES, get_shape

__all__ = [
    "DEVICES",
    "SHAPES",
    "Cost",
    "Counts",
    "Device",
    "Line",
    "Prediction",
    "at_run_time",
    "count",
    "count_model",
    "float_graph",
    "get_device",
    "get_shape",
    "integer_graph",
    "predict",
    "random_model",
]
