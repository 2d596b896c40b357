"""Blocks with something in a rewrite's way: it is left out there, and otherwise the output stays equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import mq_ao
from mq_ao import MqAoError, passes
from mq_ao.graph import match
from mq_ao.lowering import inductor
from mq_ao.passes import Status
from mq_ao.quantizer import MambaQuantizer, w8a8

D, E, N, RANK = 16, 32, 8, 4
silu = functional.silu
# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9


class Block(nn.Module):
    """The parts of a Mamba block, put together by `body`."""

    def __init__(self, body: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.norm, self.ln = nn.RMSNorm(D), nn.LayerNorm(D)
        self.into = nn.Linear(D, 2 * E, bias=False)
        self.wide = nn.Linear(D, 2 * E + 8, bias=False)
        self.taps = nn.Parameter(torch.randn(E, 4) * 0.3)
        self.low = nn.Linear(E, RANK + 2 * N)
        self.up = nn.Linear(RANK, E, bias=False)
        self.bias = nn.Parameter(torch.randn(E))
        self.decay = nn.Parameter(torch.rand(E, N) + 0.5)
        self.after = nn.LayerNorm(E)
        self.out, self.other = nn.Linear(E, D, bias=False), nn.Linear(E, D, bias=False)
        self.narrow, self.mix = nn.Linear(D, 1), nn.Linear(D, D)
        for norm in (self.norm, self.ln, self.after):
            for parameter in norm.parameters():
                nn.init.normal_(parameter)
        nn.init.normal_(self.low.bias, std=5)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, D) -> the same shape."""
        return self.body(self, x)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u and z."""
        u, z = self.into(self.norm(x)).chunk(2, -1)
        return u, z

    def scan(self, u: Tensor, change: Callable[[Tensor], Tensor] = lambda delta: delta) -> Tensor:
        """Convolution and scan, with a change of delta."""
        return self.operands(u, change)[0]

    def operands(self, u: Tensor, change: Callable[[Tensor], Tensor] = lambda delta: delta) -> tuple[Tensor, ...]:
        """y, delta and C."""
        u, _ = torch.ops.mq_ao.causal_conv1d(u, self.taps, None, None, "silu")
        low, b, c = self.low(u).split([RANK, N, N], -1)
        delta = change(self.up(low))
        y, _ = torch.ops.mq_ao.selective_scan(u, delta, -self.decay, b, c, None, self.bias, True)
        return y, delta, c


def gated(m: Block, x: Tensor, rest: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """out(y silu(z)) and what `rest` makes of y, u and z."""
    u, z = m.halves(x)
    y = m.scan(u)
    return x + m.out(y * silu(z)) + rest(y, u, z)


def total(value: Tensor) -> Tensor:
    return value.abs().sum((1, 2))[:, None, None]


def shared_silu(m: Block, x: Tensor) -> Tensor:
    u, z = m.halves(x)
    g = silu(z)
    return x + m.out(m.scan(u) * g + m.scan(u.flip(1)).flip(1) * g)


def silu_elsewhere(m: Block, x: Tensor) -> Tensor:
    u, z = m.halves(x)
    g = silu(z)
    return x + m.out(m.scan(u) * g) + m.other(g)


def norm_after(change: Callable[[Tensor], Tensor]) -> Callable[[Block, Tensor], Tensor]:
    def body(m: Block, x: Tensor) -> Tensor:
        u, z = m.halves(x)
        return x + m.out(change(functional.rms_norm(m.scan(u) * silu(z), (E,), m.after.weight)))

    return body


def norm_each(m: Block, x: Tensor) -> Tensor:
    u, z = m.halves(x)
    parts = [
        functional.rms_norm(m.scan(v) * silu(w), (E,), m.after.weight) for v, w in ((u, z), (u.flip(1), z.flip(1)))
    ]
    return x + m.out(parts[0] + parts[1].flip(1))


def no_gate(m: Block, x: Tensor) -> Tensor:
    return x + m.out(m.after(m.scan(m.halves(x)[0])))


def narrow_gate(m: Block, x: Tensor) -> Tensor:
    return x + m.out(m.scan(m.halves(x)[0]) * silu(m.narrow(x)))


def plus_skip(m: Block, x: Tensor) -> Tensor:
    u, z = m.halves(x)
    return x + m.out(m.scan(u) * silu(z) + u)


def changed_delta(change: Callable[[Tensor], Tensor]) -> Callable[[Block, Tensor], Tensor]:
    def body(m: Block, x: Tensor) -> Tensor:
        u, z = m.halves(x)
        return x + m.out(m.scan(u, change) * silu(z))

    return body


def read_operand(index: int) -> Callable[[Block, Tensor], Tensor]:
    def body(m: Block, x: Tensor) -> Tensor:
        u, z = m.halves(x)
        found = m.operands(u)
        return x + m.out(found[0] * silu(z)) + total(found[index].transpose(1, 2))

    return body


def overlapping(m: Block, x: Tensor) -> Tensor:
    h = m.wide(m.norm(x))
    y = m.scan(h[..., :E]) + m.scan(h[..., 8 : E + 8].flip(1)).flip(1)
    return x + m.out(y * silu(h[..., E + 8 :]))


def layer_norm_scaled(m: Block, x: Tensor) -> Tensor:
    u, z = m.into(m.ln(x) * 0.5).chunk(2, -1)
    return x + m.out(m.scan(u) * silu(z))


def norm_in_part(m: Block, x: Tensor) -> Tensor:
    h = m.ln(x)
    u, z = m.into(h).chunk(2, -1)
    return x + m.out(m.scan(u) * silu(z)) + functional.linear(h[..., :8], m.mix.weight[:, :8])


def stream(change: Callable[[Tensor], Tensor]) -> Callable[[Block, Tensor], Tensor]:
    def body(m: Block, x: Tensor) -> Tensor:
        h = m.mix(x)
        u, z = m.into(functional.rms_norm(h, (D,))).chunk(2, -1)
        return m.mix(functional.rms_norm(change(h + m.out(m.scan(u) * silu(z))), (D,)))

    return body


def one_more(h: Tensor) -> Tensor:
    h += 1.0
    return h


# Name: what the block computes, the pass, and whether it can be applied.
CASES: dict[str, tuple[Callable[[Block, Tensor], Tensor], str, bool]] = {
    "plain": (changed_delta(lambda delta: delta), "smooth_gate", True),
    "one activation, two gates": (shared_silu, "smooth_gate", True),
    "activation read elsewhere": (silu_elsewhere, "smooth_gate", False),
    "second activation": (lambda m, x: gated(m, x, lambda y, u, z: m.other(silu(z))), "smooth_gate", False),
    "two out_projs": (
        lambda m, x: gated(m, x, lambda y, u, z: m.other(m.scan(u.flip(1)) * silu(z))),
        "smooth_gate",
        False,
    ),
    "skip after the gate": (plus_skip, "smooth_gate", False),
    "norm, then a number": (norm_after(lambda h: h * 0.5), "smooth_gate", False),
    "norm alone": (norm_after(lambda h: h), "smooth_gate", True),
    "norm a direction": (norm_each, "smooth_gate", False),
    "LayerNorm without a gate": (no_gate, "smooth_gate", True),
    "gate of one channel": (narrow_gate, "smooth_gate", False),
    "z read channel-first": (lambda m, x: gated(m, x, lambda y, u, z: total(z.transpose(1, 2))), "smooth_gate", False),
    "z read by heads": (
        lambda m, x: gated(m, x, lambda y, u, z: total(z.unflatten(-1, (4, 8)).sum(-1))),
        "smooth_gate",
        False,
    ),
    "u read channel-first": (lambda m, x: gated(m, x, lambda y, u, z: total(u.transpose(1, 2))), "smooth_conv", False),
    "convolutions of overlapping channels": (overlapping, "smooth_conv", False),
    "C read elsewhere": (read_operand(2), "smooth_state", False),
    "delta read elsewhere": (read_operand(1), "shift_dt", False),
    "delta scaled": (changed_delta(lambda delta: delta * 0.25), "shift_dt", False),
    "delta normed": (changed_delta(lambda delta: functional.rms_norm(delta, (E,))), "shift_dt", False),
    "delta as it is": (changed_delta(lambda delta: delta), "shift_dt", True),
    "LayerNorm times a number": (layer_norm_scaled, "fold_norm", False),
    "norm read in part": (norm_in_part, "fold_norm", False),
    "stream": (stream(lambda h: h), "rotate_residual", True),
    "stream plus a number": (stream(one_more), "rotate_residual", False),
    "stream added with a factor": (stream(lambda h: torch.add(h, h.flip(1), alpha=2)), "rotate_residual", False),
    "stream reversed in its channels": (stream(lambda h: h.flip(2)), "rotate_residual", False),
}


@pytest.mark.parametrize(("body", "name", "suits"), CASES.values(), ids=CASES)
def test_outputs_stay_equal_and_what_does_not_suit_is_left_out(
    body: Callable[[Block, Tensor], Tensor], name: str, suits: bool
) -> None:
    torch.manual_seed(0)
    model = Block(body).double().eval()
    x = torch.randn(4, 9, D, dtype=torch.float64)
    graph = mq_ao.export(model, (x[:2],)).module(check_guards=False)
    assert match(graph).blocks
    batches = [(torch.randn(8, 9, D, dtype=torch.float64),) for _ in range(2)]
    rewrite = passes.apply(graph, [name], batches)
    kinds = {item.status for item in rewrite.transforms if item.name == name}
    assert kinds == {Status.APPLIED if suits else Status.LEFT_OUT}
    with torch.no_grad():
        got, expected = graph(x), model(x)
    assert float((got - expected).norm() / expected.norm()) < EXACT


@pytest.mark.parametrize("name", ["shift_dt", "smooth_state"])
def test_what_changes_the_scan_goes_before_expose_state(name: str) -> None:
    torch.manual_seed(0)
    model = Block(CASES["plain"][0]).eval()
    x = torch.randn(2, 9, D)
    graph = mq_ao.export(model, (x,)).module(check_guards=False)
    with pytest.raises(MqAoError, match="put it before expose_state"):
        passes.apply(graph, ["expose_state", name], [(x,)])


GATES = {
    "flipped activation": lambda m, x: m.out(m.scan(m.halves(x)[0]) * silu(m.halves(x)[1]).flip(1)),
    "part of an activation": lambda m, x: m.out(m.scan(m.halves(x)[0]) * silu(m.into(m.norm(x)))[..., E:]),
    "gate of one channel": lambda m, x: m.out(m.scan(m.halves(x)[0]) * silu(m.narrow(x))),
}


@pytest.mark.parametrize("body", GATES.values(), ids=GATES)
def test_gates_that_no_kernel_takes_are_computed_as_written(body: Callable[[Block, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Block(body).eval()
    x = torch.randn(2, 9, D)
    prepared = prepare_pt2e(mq_ao.export(model, (x,)).module(check_guards=False), MambaQuantizer().set_global(w8a8()))
    with torch.no_grad():
        prepared(x)
    converted = convert_pt2e(prepared)
    integer = inductor.rewrite(converted)
    assert not any("gate" in kernel for kernel in integer.kernels)
    with torch.no_grad():
        got, expected = integer.module(x), converted(x)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
