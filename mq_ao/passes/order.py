"""Which passes go together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from mq_ao.errors import MqAoError

_FIRST = "plant_outliers"
_BEFORE = (
    ("fold_norm", "rotate_residual", "a rotation needs norms without weight"),
    ("smooth_gate", "rotate_out_proj", "a rotation mixes the gate's channels"),
    ("smooth_dt", "rotate_dt", "the ranges of single channels are not known after a rotation"),
    ("shift_dt", "rotate_dt", "the ranges of single channels are not known after a rotation"),
    ("shift_dt", "expose_state", "it changes the bias of the scan, which is then in pieces"),
    ("smooth_state", "expose_state", "it scales the states of the scan, which is then in pieces"),
)
_NEEDS = {"rotate_state": ("expose_state", "it rotates the product h C, which is a node of its own only then")}
_APART = ("fold_norm", "smooth_norm", "the weight of a norm can go into the linears or take a share of their ranges")


def check_order(names: Sequence[str]) -> None:
    """Checks that these passes can follow one another; passes that are not ours may stand anywhere.

    Raises:
        MqAoError: one stands twice, or before or after one that it does not go with; the message says where to put it.
    """
    place = {name: index for index, name in enumerate(names)}
    for index, name in enumerate(names):
        if place[name] != index:
            raise MqAoError(f"pass {name} stands there twice: give each pass once.")
    if place.get(_FIRST, 0) > 0:
        raise MqAoError(
            f"pass {_FIRST} stands after {names[0]}: put it first, since it stands for the model's weights."
        )
    for early, late, reason in _BEFORE:
        if early in place and late in place and place[early] > place[late]:
            raise MqAoError(f"pass {early} stands after {late}: put it before {late}, since {reason}.")
    for name, (needed, reason) in _NEEDS.items():
        if name in place and place.get(needed, len(names)) > place[name]:
            raise MqAoError(f"pass {name} needs {needed}: put {needed} before it, since {reason}.")
    one, other, reason = _APART
    if one in place and other in place:
        raise MqAoError(f"passes {one} and {other} do not go together: {reason}, but not both.")
