"""The recipes that have a name, and finding one by name or file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.passes import Basis, Pass
from mq_ao.passes.balance import Size
from mq_ao.passes.expose_state import ExposeState
from mq_ao.passes.fold_norm import FoldNorm
from mq_ao.passes.rotate_dt import RotateDt
from mq_ao.passes.rotate_out_proj import RotateOutProj
from mq_ao.passes.rotate_residual import RotateResidual
from mq_ao.passes.rotate_state import RotateState
from mq_ao.passes.shift_dt import ShiftDt
from mq_ao.passes.smooth_conv import SmoothConv
from mq_ao.passes.smooth_dt import SmoothDt
from mq_ao.passes.smooth_gate import SmoothGate
from mq_ao.passes.smooth_norm import SmoothNorm
from mq_ao.passes.smooth_state import Partner, SmoothState
from mq_ao.quantizer import Activation, QuantizationConfig, RoleSpec, Rounding, w8a8
from mq_ao.recipe import Recipe
from mq_ao.recipe_files import SUFFIXES, read_recipe

_FOUR_BITS = (Role.IN_PROJ, Role.OUT_PROJ, Role.LINEAR, Role.HEAD)
"""Roles with most of the weights. x_proj and dt_proj are small and sensitive, and stay at 8 bits."""

SMOOTHQUANT: tuple[Pass, ...] = (SmoothNorm(), SmoothDt(), SmoothConv(alpha=0.5))
"""The scales that merge into neighbouring weights without changing an operator (Xiao et al., ICML 2023)."""

QUAROT: tuple[Pass, ...] = (
    FoldNorm(),
    RotateResidual(basis=Basis.HADAMARD),
    RotateDt(basis=Basis.HADAMARD),
    RotateOutProj(),
)
"""Hadamard rotations alone (Ashkboos et al., NeurIPS 2024)."""

MAMBAQUANT_PAPER: tuple[Pass, ...] = (
    FoldNorm(),
    SmoothGate(),
    SmoothState(),
    SmoothDt(),
    SmoothConv(alpha=0.5),
    ShiftDt(),
    RotateResidual(),
    RotateDt(),
    RotateOutProj(),
    ExposeState(),
    RotateState(),
)
"""Everything in docs/method.md, sections 1 to 4."""

MAMBAQUANT: tuple[Pass, ...] = (
    FoldNorm(),
    SmoothGate(),
    SmoothState(partner=Partner.INPUT),
    SmoothDt(),
    SmoothConv(),
    RotateResidual(),
    RotateDt(),
    RotateOutProj(),
)
"""What the ablation keeps: nothing inside the recurrence, and no shift, which asymmetric ranges do not need."""

MAMBAQUANT_4 = tuple(
    SmoothGate(alpha=0.25, size=Size.POWER) if isinstance(item, SmoothGate) else item for item in MAMBAQUANT
)
"""The same for 4-bit weights, which lose more than activations: they keep most of the balance, and what the rotation
spreads is the power of a channel."""


def _grouped(scheme: QuantizationConfig, rounding: Rounding, bits: int = 4) -> QuantizationConfig:
    roles = {role: replace(scheme.roles[role], bits=bits, group_size=64, rounding=rounding) for role in _FOUR_BITS}
    return scheme.replaced(**{str(role): spec for role, spec in roles.items()})


def _four_bit_tokens(scheme: QuantizationConfig) -> QuantizationConfig:
    """The scheme with int4 inputs, a scale a token and group, where rotations make them flat."""
    roles = {
        str(role): replace(scheme.roles[role], activation=Activation.PER_GROUP, activation_bits=4)
        for role in (Role.IN_PROJ, Role.OUT_PROJ)
    }
    return scheme.replaced(**roles)


def _weight_only(rounding: Rounding, bits: int) -> QuantizationConfig:
    scheme = w8a8(Activation.NONE).replaced(conv1d=None)
    return scheme if bits == 8 else _grouped(scheme, rounding, bits)


_STATIC = w8a8(Activation.STATIC)
_SCAN = _STATIC.replaced(scan=RoleSpec())
_PAPER = _STATIC.replaced(state=RoleSpec())
# One scale a token where a kernel has the whole token in hand: after the norm, and after the gate and its rotation.
_PRODUCTION = _STATIC.replaced(
    in_proj=RoleSpec(Activation.PER_TOKEN),
    out_proj=RoleSpec(Activation.PER_TOKEN),
    linear=RoleSpec(Activation.PER_TOKEN),
    head=RoleSpec(Activation.PER_TOKEN),
    scan=RoleSpec(),
)

_W8A8 = (
    Recipe("rtn-w8a8", _STATIC),
    Recipe("rtn-w8a8-dynamic", w8a8(Activation.PER_TOKEN)),
    Recipe("rtn-scan-w8a8", _SCAN),
    Recipe("smoothquant-w8a8", _STATIC, SMOOTHQUANT),
    Recipe("quarot-w8a8", _STATIC, QUAROT),
    Recipe("mambaquant-paper-w8a8", _PAPER, MAMBAQUANT_PAPER),
    Recipe("mambaquant-static-w8a8", _SCAN, MAMBAQUANT),
    Recipe("mambaquant-w8a8", _PRODUCTION, MAMBAQUANT),
)
_W4A8 = (
    Recipe("rtn-w4a8", _grouped(_STATIC, Rounding.NEAREST)),
    Recipe("smoothquant-w4a8", _grouped(_STATIC, Rounding.NEAREST), SMOOTHQUANT),
    Recipe("quarot-w4a8", _grouped(_STATIC, Rounding.GPTQ), QUAROT),
    Recipe("mambaquant-paper-w4a8", _grouped(_PAPER, Rounding.GPTQ), MAMBAQUANT_PAPER),
    Recipe("mambaquant-static-w4a8", _grouped(_SCAN, Rounding.FISHER), MAMBAQUANT_4),
    Recipe("mambaquant-w4a8", _grouped(_PRODUCTION, Rounding.FISHER), MAMBAQUANT_4),
)
# The schemes of w4a8, and tokens of 4 bits in the same places for all.
_W4A4 = (
    Recipe("rtn-w4a4", _four_bit_tokens(_grouped(_STATIC, Rounding.NEAREST))),
    Recipe("quarot-w4a4", _four_bit_tokens(_grouped(_STATIC, Rounding.GPTQ)), QUAROT),
    Recipe("mambaquant-w4a4", _four_bit_tokens(_grouped(_PRODUCTION, Rounding.FISHER)), MAMBAQUANT_4),
)
# Weights alone: only rotations that cost nothing at run time.
_WEIGHT_ONLY = (
    Recipe("rtn-w8a16", _weight_only(Rounding.NEAREST, 8)),
    Recipe("rtn-w4a16", _weight_only(Rounding.NEAREST, 4)),
    Recipe("rtn-w3a16", _weight_only(Rounding.NEAREST, 3)),
    Recipe("mambaquant-w8a16", _weight_only(Rounding.NEAREST, 8), (FoldNorm(), RotateResidual(), RotateDt())),
    Recipe("mambaquant-w4a16", _weight_only(Rounding.FISHER, 4), (FoldNorm(), RotateResidual(), RotateDt())),
    Recipe("mambaquant-w3a16", _weight_only(Rounding.FISHER, 3), (FoldNorm(), RotateResidual(), RotateDt())),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*_W8A8, *_W4A8, *_W4A4, *_WEIGHT_ONLY)}
)
"""The named recipes.

rtn rounds to nearest without rewrites. w8a8: 8-bit weights and activations; w4a8: in_proj, out_proj, head and linears
outside the blocks with 4-bit weights in groups of 64, the rest with 8; w4a4: besides, the inputs of in_proj and
out_proj in 4 bits, with a scale for every 64 channels of a token, all others in 8; w8a16, w4a16, w3a16: weights alone,
float activations. CPUs hold 4-bit activations in 8 bits, and 3-bit weights in 4: these recipes show what fewer bits
cost, and gain neither time nor memory over w4a8 and w4a16.
`mambaquant` takes one scale a token for in_proj, out_proj, head and linears outside the blocks; `mambaquant-static` is
static throughout. Both have the scan's operands in int8. The gate's stay in float: smoothing out_proj's input through
the gate unbalances z.
"""


def get_recipe(recipe: str | Path | Recipe) -> Recipe:
    """Returns the recipe of that name, or of that file (.yaml, .yml, .json), or the recipe itself.

    Raises:
        MqAoError: there is none of that name; the message lists the known ones. Or the file is not a recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.lower().endswith(SUFFIXES)):
        return read_recipe(recipe)
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise MqAoError(f"unknown recipe {recipe!r}: the recipes are {', '.join(RECIPES)}.")
    return RECIPES[recipe]
