"""What the processes of all stages import, imported once; nothing here may use a GPU."""

from __future__ import annotations

import mq_ao.api
import mq_ao.lowering.cuda
import mq_ao.roofline  # noqa: F401  (as all three: for the processes that are forked)
