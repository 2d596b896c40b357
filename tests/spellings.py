"""Exact equivalents of a Mamba block, as people write them, and what is checked of each."""

from __future__ import annotations

import math
from collections.abc import Callable

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional

import mq_ao
from mq_ao import passes
from mq_ao.lowering import inductor
from mq_ao.recipes import RECIPES

D, E, N, RANK, TAPS = 16, 32, 8, 4, 4
RECIPE = "mambaquant-w8a8"
# Rewrites are computed in float64; what is left is rounding of some thousand operations.
EXACT = 1e-9
# A value on the border between two integers may fall to either side where sums are formed in another order.
FLIPPED_STEP = 2e-2
silu = functional.silu

Body = Callable[..., Tensor]
"""Of a block, the residual stream (batch, length, D) and perhaps a mask (batch, length)."""


class WrittenNorm(nn.Module):
    """An RMSNorm that a user wrote."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    """The parts of a Mamba block, put together by `body`."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.embed, self.head = nn.Linear(6, D), nn.Linear(D, 5)
        self.norm, self.last_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.in_proj, self.out_proj = nn.Linear(D, 2 * E, bias=False), nn.Linear(E, D, bias=False)
        self.conv1d = nn.Conv1d(E, E, TAPS, groups=E, padding=TAPS - 1)
        self.symmetric, self.other = (nn.Conv1d(E, E, 3, groups=E, padding="same") for _ in range(2))
        self.wide = nn.Linear(2 * E, D, bias=False)
        self.x_proj = nn.Linear(E, RANK + 2 * N, bias=False)
        self.lora_a, self.lora_b = nn.Linear(E, 2, bias=False), nn.Linear(2, RANK + 2 * N, bias=False)
        self.dt_proj = nn.Linear(RANK, E)
        self.dt_low, self.dt_full = nn.Linear(E, RANK), nn.Linear(E, E)
        self.b_proj, self.c_proj = nn.Linear(E, N), nn.Linear(E, N)
        self.A_log = nn.Parameter(torch.rand(E, N))
        self.D = nn.Parameter(torch.rand(E) + 0.5)
        self.written = WrittenNorm(D)
        with torch.no_grad():
            # Every part has influence: nothing drowns in the residual stream or in D u.
            for name, part in self.named_modules():
                if isinstance(part, nn.Linear | nn.Conv1d) and name not in ("embed", "head"):
                    part.weight.mul_(3)
            self.dt_proj.bias.sub_(1)
            for norm in (self.norm, self.last_norm):
                norm.weight.add_(0.3 * torch.randn(D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch, length, 6), perhaps a mask (batch, length) -> (batch, length, 5)."""
        hidden = self.embed(x)
        hidden = hidden + (self.body(self, hidden) if mask is None else self.body(self, hidden, mask))
        return self.head(self.last_norm(hidden))

    @property
    def A(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(self.norm(h)).chunk(2, -1)
        return x, z

    def conv(self, x: Tensor) -> Tensor:
        """Channel-last."""
        y, _ = torch.ops.mq_ao.causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, "silu")
        return y

    def low(self, u: Tensor) -> tuple[Tensor, ...]:
        return self.x_proj(u).split([RANK, N, N], -1)

    def scan(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor, skip: bool = True, softplus: bool = True) -> Tensor:
        a = -torch.exp(self.A_log)
        y, _ = torch.ops.mq_ao.selective_scan(u, delta, a, b, c, self.D if skip else None, None, softplus)
        return y


def rest(m: Block, u: Tensor, z: Tensor) -> Tensor:
    """All behind the convolution."""
    dt, b, c = m.low(u)
    return m.out_proj(m.scan(u, m.dt_proj(dt), b, c) * silu(z))


def plain(m: Block, h: Tensor) -> Tensor:
    x, z = m.halves(h)
    return rest(m, m.conv(x), z)


def delta_by(change: Callable[[Block, Tensor], Tensor], softplus: bool = True) -> Body:
    """A block whose delta comes from dt in another spelling."""

    def body(m: Block, h: Tensor) -> Tensor:
        x, z = m.halves(h)
        u = m.conv(x)
        dt, b, c = m.low(u)
        return m.out_proj(m.scan(u, change(m, dt), b, c, softplus=softplus) * silu(z))

    return body


def conv_by(change: Callable[[Block, Tensor], Tensor]) -> Body:
    """A block with another spelling of convolution and SiLU: (batch, length, channels) -> the same."""

    def body(m: Block, h: Tensor) -> Tensor:
        x, z = m.halves(h)
        return rest(m, change(m, x), z)

    return body


def low_by(change: Callable[[Block, Tensor], tuple[Tensor, ...]]) -> Body:
    """A block that takes x_proj's output apart in another way."""

    def body(m: Block, h: Tensor) -> Tensor:
        x, z = m.halves(h)
        u = m.conv(x)
        dt, b, c = change(m, u)
        return m.out_proj(m.scan(u, m.dt_proj(dt), b, c) * silu(z))

    return body


def gate_by(change: Callable[[Block, Tensor, Tensor, Tensor], Tensor]) -> Body:
    """A block with another spelling of D u and the gate: y without D u, u, z -> out_proj's input."""

    def body(m: Block, h: Tensor) -> Tensor:
        x, z = m.halves(h)
        u = m.conv(x)
        dt, b, c = m.low(u)
        return m.out_proj(change(m, m.scan(u, m.dt_proj(dt), b, c, skip=False), u, z))

    return body


def norm_by(change: Callable[[Block, Tensor], Tensor]) -> Body:
    def body(m: Block, h: Tensor) -> Tensor:
        x, z = m.in_proj(change(m, h)).chunk(2, -1)
        return rest(m, m.conv(x), z)

    return body


def channel_first(m: Block, h: Tensor) -> Tensor:
    """As mamba_ssm's slow path."""
    length = h.shape[1]
    flat = m.in_proj.weight @ einops.rearrange(m.norm(h), "b l d -> d (b l)")
    xz = einops.rearrange(flat, "d (b l) -> b d l", l=length)
    x, z = xz.chunk(2, dim=1)
    x = silu(m.conv1d(x)[..., :length])
    dt, b, c = torch.split(m.x_proj(einops.rearrange(x, "b d l -> (b l) d")), [RANK, N, N], dim=-1)
    dt = einops.rearrange(m.dt_proj.weight @ dt.t(), "d (b l) -> b d l", l=length)
    delta = functional.softplus(dt + m.dt_proj.bias[..., None])
    y, _ = torch.ops.mq_ao.selective_scan(
        x.transpose(1, 2),
        delta.transpose(1, 2),
        -torch.exp(m.A_log),
        einops.rearrange(b, "(b l) n -> b l n", l=length),
        einops.rearrange(c, "(b l) n -> b l n", l=length),
    )
    y = y.transpose(1, 2) + x * m.D[:, None]
    y = y * silu(z)
    return m.out_proj(einops.rearrange(y, "b d l -> b l d"))


def minimal(m: Block, h: Tensor) -> Tensor:
    """As mamba-minimal."""
    length = h.shape[1]
    x, z = m.in_proj(m.written(h)).split([E, E], dim=-1)
    x = einops.rearrange(x, "b l d_in -> b d_in l")
    x = m.conv1d(x)[:, :, :length]
    x = silu(einops.rearrange(x, "b d_in l -> b l d_in"))
    dt, b, c = m.x_proj(x).split(split_size=[RANK, N, N], dim=-1)
    delta = functional.softplus(m.dt_proj(dt))
    y = m.scan(x, delta, b, c, skip=False, softplus=False)
    y = y + x * m.D
    return m.out_proj(y * silu(z))


def by_sigmoid(m: Block, x: Tensor) -> Tensor:
    y = m.conv1d(x.transpose(1, 2))[..., : x.shape[1]]
    return (y * y.sigmoid()).transpose(1, 2)


def zeros_before(m: Block, x: Tensor) -> Tensor:
    x = functional.pad(x.transpose(1, 2), (TAPS - 1, 0))
    return silu(functional.conv1d(x, m.conv1d.weight, m.conv1d.bias, groups=E)).transpose(1, 2)


def slices(m: Block, u: Tensor) -> tuple[Tensor, ...]:
    low = m.x_proj(u)
    return low[..., :RANK], low[:, :, RANK : RANK + N], low[..., -N:]


def narrowed(m: Block, u: Tensor) -> tuple[Tensor, ...]:
    low = m.x_proj(u)
    return low.narrow(-1, 0, RANK), low.narrow(-1, RANK, N), low.narrow(2, RANK + N, N)


def adapted(m: Block, u: Tensor) -> tuple[Tensor, ...]:
    low = m.x_proj(u) + m.lora_b(m.lora_a(functional.dropout(u, 0.1, m.training))) * 2.0
    return low.split([RANK, N, N], -1)


def own_linears(m: Block, u: Tensor) -> tuple[Tensor, ...]:
    return m.dt_low(u), m.b_proj(u), m.c_proj(u)


def full_rank(m: Block, h: Tensor) -> Tensor:
    x, z = m.halves(h)
    u = m.conv(x)
    y = m.scan(u, functional.softplus(m.dt_full(u)), m.b_proj(u), m.c_proj(u), softplus=False)
    return m.out_proj(y * silu(z))


def activated_adapter(m: Block, u: Tensor) -> tuple[Tensor, ...]:
    return (m.x_proj(u) + m.lora_b(m.lora_a(u).relu())).split([RANK, N, N], -1)


def inplace_gate(m: Block, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
    y = y + u * m.D
    y *= silu(z)
    return y


SPELLINGS: dict[str, Body] = {
    "plain": plain,
    "dt @ weight.t()": delta_by(lambda m, dt: dt @ m.dt_proj.weight.t() + m.dt_proj.bias),
    "dt @ weight.T": delta_by(lambda m, dt: dt @ m.dt_proj.weight.T),
    "matmul by transpose": delta_by(lambda m, dt: torch.matmul(dt, m.dt_proj.weight.transpose(0, 1))),
    "F.linear": delta_by(lambda m, dt: functional.linear(dt, m.dt_proj.weight)),
    "einsum": delta_by(lambda m, dt: torch.einsum("blr,dr->bld", dt, m.dt_proj.weight)),
    "einsum, dots, weight first": delta_by(lambda m, dt: torch.einsum("d r, ... r -> ... d", m.dt_proj.weight, dt)),
    "einsum, channel-first": delta_by(lambda m, dt: torch.einsum("blr,dr->bdl", dt, m.dt_proj.weight).transpose(1, 2)),
    "weight @ dt": delta_by(lambda m, dt: (m.dt_proj.weight @ dt.transpose(1, 2)).transpose(1, 2)),
    "flat products": delta_by(lambda m, dt: (dt.reshape(-1, RANK) @ m.dt_proj.weight.t()).reshape(*dt.shape[:2], E)),
    "mm of flat": delta_by(
        lambda m, dt: torch.mm(dt.flatten(0, 1), m.dt_proj.weight.t()).unflatten(0, (dt.shape[0], dt.shape[1]))
    ),
    "addmm of flat": delta_by(
        lambda m, dt: torch.addmm(m.dt_proj.bias, dt.reshape(-1, RANK), m.dt_proj.weight.t()).view(
            dt.shape[0], dt.shape[1], E
        )
    ),
    "softplus outside": delta_by(lambda m, dt: functional.softplus(m.dt_proj(dt)), softplus=False),
    "nn.Softplus of a sum": delta_by(
        lambda m, dt: nn.Softplus()(functional.linear(dt, m.dt_proj.weight) + m.dt_proj.bias), softplus=False
    ),
    "softplus, channel-first": delta_by(
        lambda m, dt: functional.softplus(m.dt_proj(dt).transpose(1, 2)).transpose(1, 2), softplus=False
    ),
    "softplus, a bias channel-first": delta_by(
        lambda m, dt: functional.softplus(
            m.dt_proj.weight @ dt.transpose(1, 2) + m.dt_proj.bias.unsqueeze(-1)
        ).transpose(1, 2),
        softplus=False,
    ),
    "convolution cut off": conv_by(lambda m, x: silu(m.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)),
    "convolution cut off after SiLU": conv_by(
        lambda m, x: silu(m.conv1d(x.transpose(1, 2)))[:, :, : x.shape[1]].transpose(1, 2)
    ),
    "convolution cut off at the end": conv_by(
        lambda m, x: silu(m.conv1d(x.permute(0, 2, 1)).permute(0, 2, 1)[:, : x.shape[1], :])
    ),
    "convolution without its tail": conv_by(
        lambda m, x: silu(m.conv1d(x.transpose(1, 2))[..., : -(TAPS - 1)]).transpose(1, 2)
    ),
    "zeros before": conv_by(zeros_before),
    "symmetric convolution": conv_by(lambda m, x: silu(m.symmetric(x.transpose(1, 2)).transpose(1, 2))),
    "x sigmoid(x)": conv_by(by_sigmoid),
    "SiLU in place": conv_by(
        lambda m, x: nn.SiLU(inplace=True)(m.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
    ),
    "slices": low_by(slices),
    "narrow": low_by(narrowed),
    "adapter with an activation": low_by(activated_adapter),
    "tensor_split": low_by(lambda m, u: torch.tensor_split(m.x_proj(u), [RANK, RANK + N], dim=-1)),
    "LoRA": low_by(adapted),
    "three products": low_by(lambda m, u: tuple(u @ part.t() for part in m.x_proj.weight.split([RANK, N, N]))),
    "linears of their own": low_by(own_linears),
    "dt of full rank": full_rank,
    "D outside": gate_by(lambda m, y, u, z: (y + u * m.D) * silu(z)),
    "D outside, first": gate_by(lambda m, y, u, z: silu(z) * (m.D * u + y)),
    "y.mul": gate_by(lambda m, y, u, z: (y + m.D[None, None] * u).mul(silu(z))),
    "gate z sigmoid(z)": gate_by(lambda m, y, u, z: (y + u * m.D) * (z * torch.sigmoid(z))),
    "gate in place": gate_by(inplace_gate),
    "gate channel-first": gate_by(
        lambda m, y, u, z: ((y + u * m.D).transpose(1, 2) * silu(z.transpose(1, 2))).transpose(1, 2)
    ),
    "written norm": norm_by(lambda m, h: m.written(h)),
    "written norm, weight first": norm_by(
        lambda m, h: (
            m.written.weight * (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, True) + 1e-6)).to(h.dtype)
            if h.dtype == torch.float32
            else m.written.weight * (h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-6))
        )
    ),
    "written norm by sqrt": norm_by(
        lambda m, h: h / torch.sqrt(1e-5 + (h * h).mean(dim=-1, keepdim=True)) * m.written.weight
    ),
    "written norm by power": norm_by(
        lambda m, h: (h * (h.square().mean(2, keepdim=True) + 1e-5) ** -0.5) * m.written.weight
    ),
    "written norm by length": norm_by(lambda m, h: functional.normalize(h, dim=-1) * math.sqrt(D) * m.written.weight),
    "channel-first": channel_first,
    "minimal": minimal,
}


# Exact too, but not known; a part of the reason that is given.
LEFT_AS_WRITTEN = {
    "adapter with an activation": "merge the adapter first",
    "tensor_split": "tensor_split",
    "written norm by length": "is not understood",
}


def inputs(batch: int, length: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(body: Body) -> Block:
    torch.manual_seed(0)
    return Block(body).eval()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def vision(m: Block, h: Tensor) -> Tensor:
    """MambaVision's mixer: two symmetric convolutions, a scan over one half, and both halves side by side."""
    length = h.shape[1]
    x, z = einops.rearrange(m.in_proj(m.norm(h)), "b l d -> b d l").chunk(2, dim=1)
    x = silu(functional.conv1d(x, m.symmetric.weight, m.symmetric.bias, padding="same", groups=E))
    z = silu(functional.conv1d(z, m.other.weight, m.other.bias, padding="same", groups=E))
    dt, b, c = torch.split(m.x_proj(einops.rearrange(x, "b d l -> (b l) d")), [RANK, N, N], dim=-1)
    dt = einops.rearrange(m.dt_proj(dt), "(b l) d -> b d l", l=length)
    y, _ = torch.ops.mq_ao.selective_scan(
        x.transpose(1, 2),
        dt.transpose(1, 2),
        m.A.to(h.dtype),
        einops.rearrange(b, "(b l) n -> b l n", l=length),
        einops.rearrange(c, "(b l) n -> b l n", l=length),
        m.D,
        m.dt_proj.bias,
        True,
    )
    return m.wide(einops.rearrange(torch.cat([y.transpose(1, 2), z], dim=1), "b d l -> b l d"))


def masks(batch: int, length: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    """Left padding, as tokenizers give it: (batch, length) of zeros and ones."""
    return (torch.arange(length) >= torch.arange(batch)[:, None]).to(dtype)


def masked(m: Block, h: Tensor, mask: Tensor) -> Tensor:
    """As transformers' apply_mask_to_padding_states, before in_proj, before the convolution and before the scan."""
    h = (m.norm(h) * mask[:, :, None]).to(h.dtype)
    x, z = m.in_proj(h).chunk(2, -1)
    return rest(m, m.conv(x * mask[:, :, None]) * mask.unsqueeze(-1), z)


def masked_channel_first(m: Block, h: Tensor, mask: Tensor) -> Tensor:
    x, z = m.in_proj(m.norm(h)).transpose(1, 2).chunk(2, dim=1)
    x = silu(m.conv1d(x * mask[:, None])[..., : x.shape[-1]])
    return rest(m, (x * mask.unsqueeze(1)).transpose(1, 2), z.transpose(1, 2))


def masked_fill(m: Block, h: Tensor, mask: Tensor) -> Tensor:
    x, z = m.in_proj(m.norm(h)).chunk(2, -1)
    padding = (mask == 0)[..., None]
    u = m.conv(x.masked_fill(padding, 0))
    return rest(m, torch.where(mask[..., None] != 0, u, 0.0), z)


def masked_everywhere(m: Block, h: Tensor, mask: Tensor) -> Tensor:
    """Behind x_proj, before out_proj and in the gate, where shifts of channels do not pass."""
    factor = mask[..., None]
    x, z = m.halves(h)
    u = m.conv(factor * x)
    dt, b, c = m.low(u)
    y = m.scan(u, m.dt_proj(dt * factor), b * factor, c, skip=True) * silu(z * factor)
    return m.out_proj(y * factor) * factor


MASKED = {
    "product": masked,
    "channel-first": masked_channel_first,
    "masked_fill and where": masked_fill,
    "everywhere": masked_everywhere,
}


KERNELS = {"qcausal_conv1d": 1, "qselective_scan": 1}


def kernels(counts: dict[str, int]) -> dict[str, int]:
    """Convolutions and scans, and all linears, by the name of the operator."""
    names = {name.split(".")[1]: count for name, count in counts.items()}
    linears = sum(count for name, count in names.items() if "linear" in name)
    return {name: count for name, count in names.items() if name in KERNELS} | {"linears": linears}


def checked(body: Body, given: Callable[..., tuple[Tensor, ...]]) -> tuple[dict[str, int], list[str]]:
    """Captures, rewrites, quantizes and lowers a block; gives its integer kernels, and why parts stay in float.

    Args:
        body: the block.
        given: (batch, length, seed, dtype) -> inputs.
    """
    exact, probes = build(body).double(), [given(*sizes, 5, torch.float64) for sizes in ((3, 7), (1, 1), (1, 12))]
    graph = mq_ao.export(exact, given(2, 9, 0, torch.float64)).module(check_guards=False)
    for probe in probes:
        with torch.no_grad():
            assert distance(graph(*probe), exact(*probe)) < EXACT
    passes.apply(graph, RECIPES["mambaquant-paper-w8a8"].passes, [given(16, 20, 2, torch.float64)])
    for probe in probes:
        with torch.no_grad():
            assert distance(graph(*probe), exact(*probe)) < EXACT
    quantized = mq_ao.quantize(build(body), [given(8, 20, 1, torch.float32)], RECIPE)
    integer, probe = inductor.rewrite(quantized.converted), given(3, 7, 5, torch.float32)
    with torch.no_grad():
        assert distance(integer.module(*probe), quantized.converted(*probe)) < FLIPPED_STEP
    assert integer.simulated == []
    scans = [item for item in quantized.report().quantization.accepted if item.role == "scan"]
    assert all(item.detail.endswith(": u, delta, B, C") for item in scans)
    rejected = [item for item in quantized.report().quantization.rejected if item.role != "gate"]
    return kernels(integer.kernels), [f"{item.node}: {item.detail}" for item in rejected]


def alone(batch: int, length: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (inputs(batch, length, seed, dtype),)


def with_mask(batch: int, length: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return inputs(batch, length, seed, dtype), masks(batch, length, dtype)
