"""Whether a process keeps what it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from mq_ao import memory

if sys.argv[1] == "kept":
    memory.keep_freed()
for _ in range(100):  # the C library cuts its heap into several such blocks before it takes one again and again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_large_tensor_takes_pages_of_earlier_ones() -> None:
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    # Pages are 4 kB, or 2 MB where the system makes them large.
    assert faults("kept") < 10 < faults("given back")
