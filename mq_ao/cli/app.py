"""The commands, and what they have in common.

Nothing here imports torch before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated

import typer

from mq_ao import __version__
from mq_ao.cli import (
    ablate,
    bench,
    compare,
    demo,
    evaluate,
    generate,
    gpu_check,
    inspect,
    kernels,
    quantize,
    roofline,
    serve,
)
from mq_ao.cli.console import fail, show_warnings
from mq_ao.errors import MqAoError
from mq_ao.logs import quiet_libraries

app = typer.Typer(
    name="mq-ao",
    help="Quantize Mamba-family models to int8 or int4, and run them in integers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mq-ao {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is being done to stderr.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    quiet_libraries()
    show_warnings()


app.command("quantize")(quantize.quantize)
app.command("eval")(evaluate.evaluate)
app.command("ablate")(ablate.ablate)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("inspect")(inspect.inspect)
app.add_typer(bench.app, name="bench")
app.command("roofline")(roofline.roofline)
app.command("build-kernels")(kernels.build_kernels)
app.command("gpu-check")(gpu_check.gpu_check)
app.command("demo")(demo.demo)


def run() -> None:
    """Runs the command; bad input ends with one line on stderr and exit code 2, a failure of the system with 1."""
    # A terminated command still removes its temporary files; a bench has gigabytes of them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except MqAoError as error:
        fail(error)
        sys.exit(2)
    except OSError as error:
        fail(error)
        sys.exit(1)
