"""What a process does one at a time."""

from __future__ import annotations

import threading

TURN = threading.RLock()
"""Held while something that every thread sees is replaced: functions of libraries during a capture, what torchao and
Inductor patch while they edit and compile graphs."""
