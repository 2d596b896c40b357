"""Quantizes a Mamba block whose scan is a plain Python loop, as teaching code has it, without a change to the block.

What this shows: `SelectiveScan()` says that a method of the model computes Mamba's scan; how its parameters are to be
read is found out by their names and by running it, and has to agree with our operator on random inputs. The captured
program has the operator where the loop was, so it takes any length, and runs in integers. The model learns here, in
about half a minute, to recall the last symbol that was marked in a sequence of symbols.

Examples:

    python examples/plain_scan.py

    python examples/plain_scan.py --steps 40 --recipe rtn-w8a8
"""

from __future__ import annotations

import time
import warnings
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

import mq_ao
from mq_ao.capture import SelectiveScan, using_scans
from mq_ao.cli.console import kernel_counts, out
from mq_ao.lowering import inductor

SYMBOLS = 8
BATCH, LENGTH = 16, 32


class PlainMamba(nn.Module):
    """Mamba's block (Gu and Dao 2023, figure 3), written to be read."""

    def __init__(self, d_model: int, d_state: int = 8, dt_rank: int = 4, d_conv: int = 4) -> None:
        super().__init__()
        d_inner = 2 * d_model
        self.sizes = [dt_rank, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.linspace(-5, -2, d_inner))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (batch, length, d_model) -> the same shape."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[..., : hidden.shape[1]].transpose(1, 2)
        x = functional.silu(x)
        delta, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        y = self.selective_scan(x, self.dt_proj(delta), B, C)
        return self.out_proj(y * functional.silu(z))

    def selective_scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """x, delta (batch, length, d_inner), B, C (batch, length, d_state) -> y like x."""
        A = -torch.exp(self.A_log)
        delta = functional.softplus(delta + self.dt_bias)
        h = x.new_zeros(x.shape[0], *A.shape)
        ys = []
        for t in range(x.shape[1]):
            step = delta[:, t, :, None]
            h = torch.exp(step * A) * h + step * x[:, t, :, None] * B[:, t, None, :]
            ys.append((h * C[:, t, None, :]).sum(-1))
        return torch.stack(ys, dim=1) + self.D * x


class Recall(nn.Module):
    """Symbols to logits of the last marked one, after every symbol."""

    def __init__(self, d_model: int = 32, n_layer: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * SYMBOLS, d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(n_layer))
        self.layers = nn.ModuleList(PlainMamba(d_model) for _ in range(n_layer))
        self.head = nn.Linear(d_model, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, length) -> logits (batch, length, SYMBOLS)."""
        x = self.embedding(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def sequences(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(ids, the last marked symbol), both (batch, length); from SYMBOLS on ids are marked: the first, one in six."""
    gen = torch.Generator().manual_seed(seed)
    symbols = torch.randint(SYMBOLS, (batch, length), generator=gen)
    marked = torch.rand(batch, length, generator=gen) < 1 / 6
    marked[:, 0] = True
    last = torch.where(marked, torch.arange(length), 0).cummax(dim=1).values
    return symbols + SYMBOLS * marked, symbols.gather(1, last)


def train(steps: int) -> Recall:
    """A model after that many steps of new sequences."""
    torch.manual_seed(0)
    model = Recall()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
    for step in track(range(steps), "training"):
        ids, wanted = sequences(BATCH, LENGTH, seed=step)
        functional.cross_entropy(model(ids).flatten(0, 1), wanted.flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return model.eval()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 16 sequences.")] = 150,
    recipe: Annotated[str, typer.Option(help="Of the quantization.")] = "mambaquant-w8a8",
    length: Annotated[int, typer.Option(min=2, help="Length of the sequences to evaluate on.")] = 500,
) -> None:
    """Trains, quantizes and compiles a model with a plain loop, and prints what that cost."""
    warnings.filterwarnings("ignore")
    model = train(steps)
    # Seeds that training does not reach.
    calibration = [(sequences(BATCH, LENGTH, seed=1_000_000 + index)[0],) for index in range(8)]

    # 1. Left alone, the loop is refused before it is traced, and the message says what to do.
    try:
        mq_ao.export(model, calibration[0])
    except mq_ao.MqAoError as error:
        out().print(f"Without scans=: {error}\n", markup=False)

    # 2. Named, it is our operator; the model stays what it is.
    with using_scans({"PlainMamba.selective_scan": SelectiveScan()}):
        quantized = mq_ao.quantize(model, calibration, recipe)
    out().print(quantized.report().match, markup=False)
    integer = inductor.rewrite(quantized.converted)
    compiled = inductor.compiled(quantized.converted, calibration[0])

    # 3. Another batch and length than any before.
    ids, wanted = sequences(8, length, seed=2_000_000)
    compiled(ids)  # what is done once for a new shape
    with torch.no_grad():
        start = time.perf_counter()
        reference = model(ids)
        middle = time.perf_counter()
        logits = compiled(ids)
        end = time.perf_counter()
    error = float((logits - reference).norm() / reference.norm())
    same = float((logits.argmax(-1) == reference.argmax(-1)).double().mean())
    right, kept = (float((x.argmax(-1) == wanted).double().mean()) for x in (reference, logits))
    out().print(
        f"\n8 new sequences of {length} symbols: {right:.2%} recalled in float32 (the loop, {middle - start:.2f} s), "
        f"{kept:.2%} in int8 (compiled, {end - middle:.3f} s); the same answer for {same:.2%}, logits differ by "
        f"{error:.1%}.\nInteger kernels of mq-ao: {kernel_counts(integer.kernels)}. Left to Inductor: "
        f"{', '.join(integer.simulated) or 'nothing'}.",
        markup=False,
    )


if __name__ == "__main__":
    typer.run(main)
