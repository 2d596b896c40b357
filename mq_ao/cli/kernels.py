"""`mq-ao build-kernels`: compiles the native kernels ahead of their first use."""

from __future__ import annotations

from typing import Annotated

import typer

from mq_ao.cli.console import out, step


def build_kernels(
    force: Annotated[bool, typer.Option("--force", help="Build even if an up-to-date build is cached.")] = False,
    executorch: Annotated[
        bool, typer.Option("--executorch", help="Build the library for ExecuTorch's runtime instead of PyTorch's.")
    ] = False,
) -> None:
    """Build the native kernels for this machine (about half a minute; cached).

    CXX chooses the compiler, MQ_AO_CACHE the folder.

    [bold]Example[/bold]

    mq-ao build-kernels --force
    """
    if executorch:
        from mq_ao.ops.native.executorch_build import build as build_executorch

        with step("building the ExecuTorch kernels"):
            path = build_executorch(force=force)
    else:
        with step("building the native kernels"):
            from mq_ao.ops.native.build import build

            path = build(force=force)
    out().print(path, markup=False, highlight=False, soft_wrap=True)
