"""The command line: `mq-ao quantize | eval | generate | inspect | bench | roofline | gpu-check | demo` and more."""

from __future__ import annotations

import sys

from mq_ao.errors import MqAoError
from mq_ao.extras import needs


def main() -> None:
    """Entry point: `mq_ao.cli.app.run`, or one line on stderr and exit code 1 where the extra `cli` is missing."""
    try:
        with needs("the command line", extra="cli"):
            from mq_ao.cli.app import run
    except MqAoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    run()
