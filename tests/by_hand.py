"""Mamba blocks whose scan is written out in Python, in the ways that teaching code has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

D_MODEL, D_STATE, DT_RANK = 16, 4, 3


class Block(nn.Module):
    """All but the scan, which is `scan` of (u, dt before bias and softplus, z)."""

    def __init__(self, d_model: int = D_MODEL, d_state: int = D_STATE) -> None:
        super().__init__()
        d_inner = 2 * d_model
        self.sizes = [DT_RANK, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, 4, groups=d_inner, padding=3)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(DT_RANK, d_inner)
        self.A_log = nn.Parameter(torch.rand(d_inner, d_state) * 2 - 1)
        self.D = nn.Parameter(torch.rand(d_inner) + 0.5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = silu(self.conv1d(u.transpose(1, 2))[:, :, :length].transpose(1, 2))
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        return self.out_proj(self.mixed(u, linear(dt, self.dt_proj.weight), B, C, z))

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError


def loop(deltaA: Tensor, deltaB_u: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, length, channels, d_state) and C (batch, length, d_state) -> y, last state."""
    h = torch.zeros_like(deltaA[:, 0])
    ys = []
    for t in range(deltaA.shape[1]):
        h = deltaA[:, t] * h + deltaB_u[:, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(ys, dim=1), h


def discretised(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2)


class MinimalBlock(Block):
    """As mamba-minimal: softplus and gate outside."""

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        A = -torch.exp(self.A_log)
        delta = softplus(dt + self.dt_proj.bias)
        return self.selective_scan(u, delta, A, B, C, self.D) * silu(z)

    def selective_scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        y, _ = loop(*discretised(u, delta, A, B), C)
        return y + u * D


class PscanBlock(MinimalBlock):
    """The same by a parallel scan of logarithmic depth."""

    def selective_scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        hs = pscan(*discretised(u, delta, A, B))
        return (hs @ C.unsqueeze(-1)).squeeze(3) + D * u


def pscan(A: Tensor, X: Tensor) -> Tensor:
    """Hillis and Steele: all states of h[t] = A[t] h[t-1] + X[t]."""
    step = 1
    while step < A.shape[1]:
        X = torch.cat([X[:, :step], X[:, step:] + A[:, step:] * X[:, :-step]], dim=1)
        A = torch.cat([A[:, :step], A[:, step:] * A[:, :-step]], dim=1)
        step *= 2
    return X


class CumsumBlock(MinimalBlock):
    """The same by cumulative sums, good for short sequences."""

    def selective_scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        decays = (delta.unsqueeze(-1) * A).cumsum(1)
        x = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        hs = torch.exp(decays) * (x * torch.exp(-decays)).cumsum(1)
        return torch.einsum("bldn,bln->bld", hs, C) + u * D


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything inside, (batch, channels, length)."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = softplus(delta) if delta_softplus else delta
    x = u.transpose(1, 2)
    y, last = loop(*discretised(x, delta.transpose(1, 2), A, B.transpose(1, 2)), C.transpose(1, 2))
    y = y.transpose(1, 2)
    y = y if D is None else y + u * D[:, None]
    y = y if z is None else y * silu(z)
    return (y, last) if return_last_state else y


class ReferenceBlock(Block):
    """Calls a function of its file, channel-first, with bias, softplus, D and gate inside."""

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        u, dt, B, C, z = (value.transpose(1, 2) for value in (u, dt, B, C, z))
        A = -torch.exp(self.A_log)
        y, last = selective_scan_ref(u, dt, A, B, C, self.D, z, self.dt_proj.bias, True, return_last_state=True)
        return y.transpose(1, 2) + 0 * last.sum()


class OwnBlock(Block):
    """A method that reads A_log, the bias of dt and D of its module, and returns the last state."""

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        y, _ = self.scan(u, dt, B, C)
        return y * silu(z)

    def scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        dt = softplus(dt + self.dt_proj.bias)
        y, last = loop(*discretised(x, dt, -torch.exp(self.A_log), B), C)
        return y + self.D * x, last


class WithoutDBlock(Block):
    """A static method without D, under names that tell nothing, of (batch, channels, length) and A_log."""

    def mixed(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        dt = (dt + self.dt_proj.bias).transpose(1, 2)
        return self.run(u.transpose(1, 2), dt, self.A_log, (B, C)[0], C).transpose(1, 2) * silu(z)

    @staticmethod
    def run(signal: Tensor, steps: Tensor, decays: Tensor, into: Tensor, out: Tensor) -> Tensor:
        x, dt = signal.transpose(1, 2), softplus(steps).transpose(1, 2)
        return loop(*discretised(x, dt, -torch.exp(decays), into), out)[0].transpose(1, 2)


class Stack(nn.Module):
    """Token ids to logits through residual blocks."""

    def __init__(self, kind: type[Block], count: int = 2, vocab_size: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, D_MODEL)
        self.layers = nn.ModuleList(kind() for _ in range(count))
        self.norms = nn.ModuleList(nn.RMSNorm(D_MODEL) for _ in range(count))
        self.head = nn.Linear(D_MODEL, vocab_size, bias=False)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)
