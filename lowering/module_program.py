"""What saved programs of modules without states have in common: one forward pass, its inputs checked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError, first_line
from mq_ao.lowering.lowered_program import LoweredProgram
from mq_ao.lowering.signature import Signature


class ModuleProgram(LoweredProgram):
    """A module of any kind: called with its inputs, it gives what it gives.

    Inputs come by position or by name. They are tensors or numpy arrays of the dtypes that the module was captured
    with (integers may be narrower) and are checked before compiled code reads them. `signature` says what is taken.

    Args:
        info: what the program says of itself.
        device: where it runs; inputs are moved there.
    """

    def __init__(self, info: Mapping[str, Any], device: torch.device | None = None) -> None:
        super().__init__(info)
        self._device = device or torch.device("cpu")
        self.signature = Signature.read(info["signature"])

    @abstractmethod
    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Runs the forward pass; inputs are contiguous and on the program's device."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module.

        Raises:
            MqAoError: the arguments are not what `signature` says, or what runs the program refuses them.
        """
        tensors = self.signature.bind(args, kwargs)
        inputs = [tensor.to(self._device).contiguous() for tensor in tensors]
        try:
            outputs = self.run(*inputs)
        except RuntimeError as error:
            reason = first_line(error)
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise MqAoError(f"the program cannot run on inputs of shapes {shapes}: {reason}") from error
        return self.signature.restore(outputs)
