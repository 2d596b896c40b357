"""`mq-ao build-kernels`: compiles the native kernels ahead of their first use, or the GPU's for a look at them."""

from __future__ import annotations

from typing import Annotated

import typer

from mq_ao.cli.console import check_json, out, step
from mq_ao.errors import MqAoError


def build_kernels(
    force: Annotated[bool, typer.Option("--force", help="Build even if an up-to-date build is cached.")] = False,
    executorch: Annotated[
        bool, typer.Option("--executorch", help="Build the library for ExecuTorch's runtime instead of PyTorch's.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="Compile the Triton kernels for these GPUs, such as sm_80,sm_90; none need be here."
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option(help="With --gpu: also write all rows to this file, or - for stdout.")
    ] = None,
) -> None:
    """Build the native kernels for this machine (about half a minute; cached).

    CXX chooses the compiler, MQ_AO_CACHE the folder. With --gpu nothing is kept: it shows registers, spilled bytes and
    shared memory of every kernel and configuration.

    [bold]Examples[/bold]

    mq-ao build-kernels --force

    mq-ao build-kernels --gpu sm_80,sm_90,sm_100
    """
    if json is not None and gpu is None:
        raise MqAoError("--json is for the rows of --gpu: give both.")
    if gpu is not None:
        from mq_ao.cli.gpu_kernels import compile_offline

        compile_offline(gpu, check_json(json))
        return
    if executorch:
        from mq_ao.ops.native.executorch_build import build as build_executorch

        with step("building the ExecuTorch kernels"):
            path = build_executorch(force=force)
    else:
        with step("building the native kernels"):
            from mq_ao.ops.native.build import build

            path = build(force=force)
    out().print(path, markup=False, highlight=False, soft_wrap=True)
