"""`mq-ao bench kernels`: the scans, against a product of integers and against plain PyTorch."""

from __future__ import annotations

from mq_ao.cli.benching import Json, Threads, chosen_threads, machine, write
from mq_ao.cli.console import check_json, out, ready_kernels, step


def kernels(*, threads: Threads = None, json: Json = None) -> None:
    """Time the scan kernels against an int8 matmul and against the recurrence in plain PyTorch.

    [bold]Examples[/bold]

    mq-ao bench kernels

    mq-ao bench kernels --threads 1 --json kernels.json
    """
    check_json(json)
    with step("starting"):
        from dataclasses import asdict

        from mq_ao.bench.kernels import D_MODEL, KERNELS, LENGTH, measure
    threads = chosen_threads(threads)
    ready_kernels()
    times = {}
    for kernel in KERNELS:
        with step(f"timing {kernel.name}"):
            times[kernel] = measure(kernel)
    taken_by_name = {kernel.name: asdict(taken) for kernel, taken in times.items()}
    write({"machine": machine(threads), "kernels": taken_by_name}, json)
    if json != "-":
        for kernel, taken in times.items():
            out().print(
                f"{kernel.name}, {kernel.shape}, fp32: {taken.scan_ms:.2f} ms; "
                f"torch._int_mm, {LENGTH} x {D_MODEL} x {kernel.in_proj}: {taken.int_mm_ms:.2f} ms; "
                f"ratio {taken.ratio:.2f}; recurrence in PyTorch: {taken.recurrence_ms:.0f} ms",
                soft_wrap=True,
            )
