"""`python -m mq_ao` is the command `mq-ao`."""

from __future__ import annotations

from mq_ao.cli import main

main()
