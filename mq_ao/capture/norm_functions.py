"""RMS and layer norms as one node each, whatever the source library spells out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from mq_ao.capture.replacing import Replacement

logger = logging.getLogger(__name__)

Form = Callable[..., Tensor]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, group_size: int | None = None) -> Tensor:
    """RMSNorm over the last axis, or over each run of `group_size` of its channels, times `weight`."""
    weight = None if weight is None else weight.to(x.dtype)
    if group_size is None or group_size == x.shape[-1]:
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    y = functional.rms_norm(groups, (group_size,), None, eps).flatten(-2)
    return y if weight is None else y * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, group_size: int | None = None) -> Tensor:
    """LayerNorm over the last axis, or over each run of `group_size` of its channels."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if group_size is None or group_size == x.shape[-1]:
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    y = functional.layer_norm(groups, (group_size,), None, None, eps).flatten(-2) * weight
    return y if bias is None else y + bias


def gated(norm: Callable[[Tensor], Tensor], x: Tensor, z: Tensor | None, *, norm_before_gate: bool) -> Tensor:
    """`norm(x) * silu(z)`, or `norm(x * silu(z))` (Mamba-2, Dao and Gu 2024, section 7)."""
    if z is None:
        return norm(x)
    if norm_before_gate:
        return norm(x) * functional.silu(z)
    return norm(x * functional.silu(z))


def replacements(module: nn.Module, library: str) -> Iterator[Replacement]:
    """One node for each RMSNorm that a model spells out, with the same mathematics.

    A class says by its name that it is one. What it computes (before or after a gate, in groups, with a weight, 1 +
    weight or none) differs between models, so each candidate is compared with the module itself on random input; one
    that none agrees with stays as it is.

    Args:
        module: a model with its weights.
        library: package whose classes are looked at.
    """
    for name, norm in module.named_modules():
        kind = type(norm)
        if "RMSNorm" not in kind.__name__ or kind.__module__.partition(".")[0] != library:
            continue
        form = _form_of(norm)
        if form is None:
            logger.warning("%s (%s) is not an RMSNorm that is known: captured as written", name, kind.__name__)
        else:
            yield Replacement(norm, "forward", form)


def _form_of(norm: nn.Module) -> Form | None:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    tensors = [*norm.parameters(), *norm.buffers()]
    if not isinstance(eps, float) or any(tensor.is_meta for tensor in tensors):
        return None
    sizes = {int(tensor.shape[0]) for tensor in tensors if tensor.dim() == 1}
    if len(sizes) != 1:
        return None
    (width,) = sizes
    dtype, device = tensors[0].dtype, tensors[0].device
    inputs = [name for name, value in inspect.signature(norm.forward).parameters.items() if value.kind in _POSITIONAL]
    generator = torch.Generator().manual_seed(0)
    # Small rows tell epsilons apart.
    scale = torch.tensor([1.0, 1e-3, 30.0])[:, None]
    x, z = (torch.randn(2, 3, width, generator=generator) for _ in range(2))
    probe = [(x * scale).to(device, dtype), z.to(device, dtype)][: len(inputs)]
    tolerance = 1e-5 if torch.finfo(dtype).bits >= 32 else 2e-2
    with torch.no_grad():
        expected = norm(*probe)
        for form in _candidates(norm, eps, width, has_gate=len(inputs) == 2):
            if torch.allclose(form(*probe), expected, rtol=tolerance, atol=tolerance):
                return form
    return None


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _candidates(norm: nn.Module, eps: float, width: int, *, has_gate: bool) -> Iterator[Form]:
    group_count = getattr(norm, "n_groups", getattr(norm, "ngroups", 1))
    # None for the whole axis, whatever its width: FalconMamba's norm of dt is wider than what it is applied to.
    group_sizes = dict.fromkeys([None, getattr(norm, "group_size", None), width // group_count])

    def weight() -> Tensor | None:
        # Read when called: torch.export puts its own tensor there.
        return norm._parameters.get("weight")

    for size in group_sizes:
        if not has_gate:
            yield lambda x, size=size: rms_norm(x, weight(), eps, size)
            continue
        for before in (False, True):

            def form(x: Tensor, z: Tensor | None = None, size: int | None = size, before: bool = before) -> Tensor:
                return gated(lambda x: rms_norm(x, weight(), eps, size), x, z, norm_before_gate=before)

            yield form
