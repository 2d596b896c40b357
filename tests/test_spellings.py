"""Exact equivalents of a Mamba block: matched, rewritten exactly, and run in integers; masks and heads too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mq_ao
from mq_ao import passes
from mq_ao.graph import match
from mq_ao.graph.residual import streams
from mq_ao.passes import Status
from tests.spellings import (
    EXACT,
    KERNELS,
    LEFT_AS_WRITTEN,
    MASKED,
    RECIPE,
    SPELLINGS,
    Block,
    D,
    alone,
    build,
    checked,
    distance,
    plain,
    rest,
    vision,
    with_mask,
)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in LEFT_AS_WRITTEN])
def test_exact_equivalents_are_one_block_in_integers(name: str) -> None:
    found, rejected = checked(SPELLINGS[name], alone)
    assert rejected == []
    # Embedding, head, in_proj, x_proj, dt_proj, out_proj; in_proj may be two products, for its halves.
    linears = found.pop("linears")
    assert found == KERNELS
    assert linears >= 6


@pytest.mark.parametrize("name", sorted(LEFT_AS_WRITTEN))
def test_what_is_not_known_stays_as_written_and_says_so(name: str) -> None:
    graph = mq_ao.export(build(SPELLINGS[name]), alone(2, 9, 0, torch.float32)).module(check_guards=False)
    found = match(graph)
    reasons = [item.reason for item in found.rejected] + [str(item.problem) for item in streams(graph, found.blocks)]
    assert any(LEFT_AS_WRITTEN[name] in reason for reason in reasons)


def test_both_halves_of_a_vision_mixer_run_in_integers() -> None:
    found, rejected = checked(vision, alone)
    assert rejected == []
    assert found == {"qcausal_conv1d": 2, "qselective_scan": 1, "linears": 6}


@pytest.mark.parametrize("name", MASKED)
def test_masks_pass_rewrites_and_integers(name: str) -> None:
    found, rejected = checked(MASKED[name], with_mask)
    assert rejected == []
    assert found == KERNELS | {"linears": 6}


# Rewrites, and which of the masked blocks each must leave out; R1 needs norms without weight.
ALONE = {
    ("fold_norm",): set(),
    ("smooth_norm",): set(),
    ("smooth_gate",): set(),
    ("smooth_state",): set(),
    ("smooth_dt",): set(),
    ("smooth_conv",): set(),
    ("shift_dt",): {"everywhere"},
    ("fold_norm", "rotate_residual"): set(),
    ("rotate_dt",): set(),
    ("rotate_out_proj",): set(),
    ("expose_state", "rotate_state"): set(),
}


@pytest.mark.parametrize("names", ALONE, ids="+".join)
@pytest.mark.parametrize("block", MASKED)
def test_every_rewrite_is_exact_with_masks(block: str, names: tuple[str, ...]) -> None:
    model, probe = build(MASKED[block]).double(), with_mask(3, 7, 5, torch.float64)
    graph = mq_ao.export(model, with_mask(2, 9, 0, torch.float64)).module(check_guards=False)
    rewrite = passes.apply(graph, list(names), [with_mask(16, 20, 2, torch.float64)])
    applied = {item.name for item in rewrite.transforms if item.status is Status.APPLIED}
    assert (names[-1] in applied) == (block not in ALONE[names])
    with torch.no_grad():
        assert distance(graph(*probe), model(*probe)) < EXACT


def test_a_norm_with_a_bias_is_not_folded_past_a_mask() -> None:
    def body(m: Block, h: Tensor, mask: Tensor) -> Tensor:
        h = functional.layer_norm(h, (D,), m.norm.weight, m.embed.bias) * mask[..., None]
        x, z = m.in_proj(h).chunk(2, -1)
        return rest(m, m.conv(x), z)

    model, probe = build(body).double(), with_mask(3, 7, 5, torch.float64)
    graph = mq_ao.export(model, with_mask(2, 9, 0, torch.float64)).module(check_guards=False)
    rewrite = passes.apply(graph, ["fold_norm"], [])
    assert [item.where for item in rewrite.transforms if item.status is Status.APPLIED] == ["last_norm"]
    with torch.no_grad():
        assert distance(graph(*probe), model(*probe)) < EXACT


class Ending(nn.Module):
    """A block whose classifier's scores are given to `ending`."""

    def __init__(self, ending: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.model, self.ending = Block(plain), ending

    def forward(self, x: Tensor) -> object:
        return self.ending(self.model(x))


def experts(scores: Tensor) -> Tensor:
    """Scores choose which rows of a table are added."""
    weights, chosen = functional.softmax(scores, -1).topk(2, -1)
    return (functional.one_hot(chosen, 5) * weights[..., None]).sum(-2)


ENDINGS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "softmax": (lambda scores: scores.softmax(-1), "head"),
    "in float32": (lambda scores: functional.softmax(scores.float(), dim=-1, dtype=torch.float32), "head"),
    "log_softmax": (lambda scores: functional.log_softmax(scores, -1), "head"),
    "sigmoid": (lambda scores: scores.sigmoid(), "head"),
    "argmax": (lambda scores: scores.argmax(-1), "head"),
    "topk": (lambda scores: scores.softmax(-1).topk(2, -1), "head"),
    "logits and probabilities": (lambda scores: {"logits": scores, "p": (scores / 2).softmax(-1)}, "head"),
    "soft cap": (lambda scores: 30 * torch.tanh(scores / 30), "head"),
    "experts": (experts, "a router"),
    "gather": (lambda scores: scores.gather(-1, scores.argmax(-1, keepdim=True)), "a router"),
    "largest over time": (lambda scores: scores.max(1)[0].exp() + 1, "linear"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_head_gives_results_and_a_router_chooses(name: str) -> None:
    ending, role = ENDINGS[name]
    torch.manual_seed(0)
    model = Ending(ending).eval()
    quantized = mq_ao.quantize(model, [alone(8, 20, 1, torch.float32)], RECIPE)
    decision = (
        next(item for item in quantized.report().quantization.decisions if item.module == "model.head")
        if role != "a router"
        else next(item for item in quantized.report().quantization.rejected if item.role != "gate")
    )
    assert (decision.role or decision.detail).startswith(role)
    assert decision.accepted == (role != "a router")
