"""The kernels for GPUs: registered when an operator is first called on one, since Triton is not everywhere."""

from __future__ import annotations

import warnings

from mq_ao.ops.library import loads_kernels


class TritonState:
    """What is known of the Triton kernels in this process."""

    registered = False
    failure: str | None = None


def load_triton() -> bool:
    """Registers the Triton kernels for CUDA tensors; without Triton warns once and returns False."""
    if not TritonState.registered and TritonState.failure is None:
        try:
            from mq_ao.ops import triton
        except ImportError as error:
            TritonState.failure = str(error)
            warnings.warn(
                f"mq_ao runs its slow reference operators on the GPU, because Triton cannot be imported ({error}): "
                "install a CUDA build of PyTorch, which brings it.",
                stacklevel=2,
            )
        else:
            triton.register()
            TritonState.registered = True
    return TritonState.registered


@loads_kernels("cuda")
def _load_new() -> bool:
    return not TritonState.registered and load_triton()
