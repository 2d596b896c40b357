"""What is ablated: baselines, a chain that adds one transform at a time, each transform alone, and h C quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from mq_ao.errors import MqAoError
from mq_ao.measuring.comparison import with_outliers
from mq_ao.passes import PASSES, Basis, Pass
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
from mq_ao.passes.smooth_state import Partner, SmoothState
from mq_ao.quantizer import Activation, QuantizationConfig, Range, RoleSpec, Rounding
from mq_ao.recipes import Recipe, get_recipe

BASELINES = ("rtn", "smoothquant", "quarot")
PRODUCTION = "mambaquant"
BITS = (8, 4)

CHAIN: tuple[tuple[str, tuple[Pass, ...]], ...] = (
    ("+ R1 Hadamard", (FoldNorm(), RotateResidual(Basis.HADAMARD))),
    ("R1 KLT instead", (FoldNorm(), RotateResidual(Basis.KLT))),
    ("+ R5", (RotateDt(),)),
    ("+ R2", (RotateOutProj(),)),
    ("+ S2", (SmoothGate(),)),
    ("+ S5", (SmoothDt(),)),
    ("+ S7", (SmoothConv(),)),
    ("+ S4", (SmoothState(Partner.INPUT),)),
    ("+ shift", (ShiftDt(),)),
)
"""Steps of docs/method.md in the order in which the chain adds them."""

STATE: tuple[tuple[str, tuple[Pass, ...]], ...] = (
    ("h C int8", ()),
    ("h C int8 + S4", (SmoothState(Partner.STATE),)),
    ("h C int8 + R4", (RotateState(),)),
    ("h C int8 + S4 + R4", (SmoothState(Partner.STATE), RotateState())),
)
"""What is done about h C where it is quantized as the paper does it."""


class Group(StrEnum):
    """What a step is compared with."""

    BASELINE = "baseline"
    """A published method, as its named recipe has it."""
    CHAIN = "chain"
    """The step before it in the chain."""
    ALONE = "alone"
    """The chain's first step, plain rounding to nearest."""
    STATE = "state"
    """The chain's last step before the production recipe: all of its transforms, S4 apart, and h and C in int8."""


@dataclass(frozen=True)
class Step:
    """One measurement of an ablation.

    Attributes:
        name: of the row; the same for every width of the weights.
        group: what it is compared with.
        bits: of the weights.
        recipe: what is measured.
    """

    name: str
    group: Group
    bits: int
    recipe: Recipe


def canonical(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Passes in the order of docs/method.md, section 4: folding, smoothing, shift, rotations.

    A later pass of the same name takes the place of an earlier one.
    """
    by_name = {item.name: item for item in passes}
    return tuple(by_name[name] for name in PASSES if name in by_name)


def scheme(bits: int) -> QuantizationConfig:
    """The chain's: the production recipe's, with every activation static and the scan's operands in int8 too.

    Weights that the production recipe rounds for the loss are rounded by GPTQ, as the baselines' are.

    Raises:
        MqAoError: there is no production recipe for weights of that width.
    """
    production = get_recipe(_named(PRODUCTION, bits)).scheme
    roles = {role: _static(spec) for role, spec in production.roles.items()}
    return QuantizationConfig(roles).replaced(scan=RoleSpec(), gate=None, state=None)


def all_steps(bits: int, outliers: float | None = None) -> list[Step]:
    """All steps for one width of the weights.

    Args:
        bits: of the weights, 8 or 4.
        outliers: factor of the outliers that are planted before anything else (`PlantOutliers`), or None.

    Raises:
        MqAoError: a named recipe is missing, or the factor is no outlier.
    """
    fixed = scheme(bits)

    def named(family: str, group: Group) -> Step:
        return Step(family, group, bits, with_outliers(get_recipe(_named(family, bits)), outliers))

    def step(name: str, group: Group, passes: Iterable[Pass], config: QuantizationConfig = fixed) -> Step:
        recipe = Recipe(f"{group}: {name}", config, canonical(passes))
        return Step(name, group, bits, with_outliers(recipe, outliers))

    result = [named(family, Group.BASELINE) for family in BASELINES]
    chain: tuple[Pass, ...] = ()
    result.append(step("static RTN", Group.CHAIN, ()))
    for name, added in CHAIN:
        chain = (*chain, *added)
        result.append(step(name, Group.CHAIN, chain))
    result.append(named(PRODUCTION, Group.CHAIN))
    result += [step(name, Group.ALONE, added) for name, added in CHAIN]
    without = [item for item in chain if not isinstance(item, SmoothState)]
    exposed = fixed.replaced(state=RoleSpec())
    result += [step(name, Group.STATE, (*without, ExposeState(), *added), exposed) for name, added in STATE]
    return result


def parse_bits(text: str) -> tuple[int, ...]:
    """Widths of weights from a list such as "8,4".

    Raises:
        MqAoError: it is not a list of 8 and 4.
    """
    known = {str(width): width for width in BITS}
    widths = [part.strip() for part in text.split(",")]
    if len(set(widths)) != len(widths) or not set(widths) <= set(known):
        raise MqAoError(f"--bits is {text!r}: give 8, 4 or 8,4.")
    return tuple(known[width] for width in widths)


def _named(family: str, bits: int) -> str:
    return f"{family}-w{bits}a8"


def _static(spec: RoleSpec) -> RoleSpec:
    if spec.activation is Activation.NONE:
        return spec
    rounding = Rounding.GPTQ if spec.rounding is Rounding.FISHER else spec.rounding
    return replace(spec, activation=Activation.STATIC, range=Range.HISTOGRAM, rounding=rounding)
