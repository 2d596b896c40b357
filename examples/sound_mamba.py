"""Quantizes a network of one's own with a Mamba block in its middle: a recogniser of sounds.

What this shows: the network is captured as it is; mq-ao finds the Mamba block in it by dataflow, rewrites and quantizes
it role by role together with the linears; torchao's X86InductorQuantizer quantizes the convolutions before it; both are
calibrated and compiled as one program. The sounds are made up (tones that rise, fall, waver or pulse, and noise), the
network is trained on them here, in about a minute.

Examples:

    python examples/sound_mamba.py

    python examples/sound_mamba.py --steps 40 --recipe mambaquant-w4a8
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer

import mq_ao
from mq_ao.calibration import calibrate
from mq_ao.classify import BATCH, compare, log_probabilities
from mq_ao.cli.console import kernel_counts, out
from mq_ao.lowering import inductor
from mq_ao.quantizer import MambaQuantizer
from mq_ao.recipes import get_recipe

SOUNDS = ("rising", "falling", "wavering", "pulsing", "noise")
RATE, SECONDS = 8_000, 0.5
WINDOW, HOP = 256, 64


def make_sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(spectrograms (count, 1, frames, 128) float32, which of `SOUNDS` each is (count,))."""
    gen = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=gen)

    labels = torch.randint(len(SOUNDS), (count,), generator=gen)
    time = torch.arange(int(RATE * SECONDS)) / RATE
    slope = between(400, 1600) * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])[labels, None]
    pitch = between(900, 2200) + slope * (time - SECONDS / 2)
    pitch = pitch + (labels == 2)[:, None] * between(80, 250) * torch.sin(2 * math.pi * between(4, 9) * time)
    tone = torch.sin(2 * math.pi * pitch.cumsum(-1) / RATE + between(0, 6))
    pulses = (torch.sin(2 * math.pi * between(5, 12) * time) > 0).float()
    tone = torch.where((labels == 3)[:, None], tone * pulses, tone) * (labels != 4)[:, None]
    wave = tone + between(0.3, 1.5) * torch.randn(tone.shape, generator=gen)
    spectrum = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs()
    return torch.log1p(spectrum[:, 1:]).transpose(1, 2).unsqueeze(1), labels


class Selective(nn.Module):
    """A Mamba block under names of one's own, over the operators that mq-ao provides."""

    def __init__(self, width: int, states: int = 16, rank: int = 4, taps: int = 4) -> None:
        super().__init__()
        inner = 2 * width
        self.sizes = [rank, states, states]
        self.into = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.taps = nn.Parameter(torch.randn(inner, taps) * 0.3)
        self.select = nn.Linear(inner, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, inner)
        nn.init.constant_(self.step.bias, -4.0)
        self.decay = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, width) -> the same shape."""
        u, _ = torch.ops.mq_ao.causal_conv1d(self.into(x), self.taps, None, None, "silu")
        low, b, c = self.select(u).split(self.sizes, dim=-1)
        # The bias goes into the scan, where the softplus is: steps are quantized before it.
        step = functional.linear(low, self.step.weight)
        y, _ = torch.ops.mq_ao.selective_scan(u, step, -torch.exp(self.decay), b, c, self.skip, self.step.bias, True)
        return self.out(y * functional.silu(self.gate(x)))


class Recogniser(nn.Module):
    """Convolutions over time and pitch, a Mamba block over time, a linear."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()
        )
        self.embed = nn.Linear(8 * WINDOW // 8, width)
        self.norm = nn.RMSNorm(width)
        self.block = Selective(width)
        self.last = nn.Linear(width, len(SOUNDS))

    def forward(self, spectrograms: Tensor) -> Tensor:
        """spectrograms (batch, 1, frames, 128) -> logits (batch, sounds)."""
        features = self.front(spectrograms).permute(0, 2, 1, 3).flatten(2)
        hidden = self.embed(features)
        hidden = hidden + self.block(self.norm(hidden))
        return self.last(hidden.mean(1))


def train(steps: int, seed: int = 0) -> Recogniser:
    """A recogniser after that many steps of 64 new sounds each."""
    torch.manual_seed(seed)
    model = Recogniser()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for step in track(range(steps), "training"):
        sounds, labels = make_sounds(BATCH, seed=step)
        functional.cross_entropy(model(sounds), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return model.eval()


def quantizers(scheme: mq_ao.quantizer.QuantizationConfig) -> ComposableQuantizer:
    """Ours for the Mamba block and the linears, torchao's for the convolutions in front."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    front = x86.X86InductorQuantizer()
    front.set_module_name_qconfig("front", x86.get_default_x86_inductor_quantization_config())
    return ComposableQuantizer([MambaQuantizer().set_global(scheme), front])


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 sounds.")] = 500,
    recipe: Annotated[str, typer.Option(help="Of the Mamba block and the linears.")] = "mambaquant-w8a8",
    batches: Annotated[int, typer.Option(min=1, help="Batches of 64 sounds to evaluate on.")] = 30,
) -> None:
    """Trains, quantizes and compiles a recogniser of sounds, and prints what that cost."""
    warnings.filterwarnings("ignore")
    chosen = get_recipe(recipe)
    model = train(steps)
    # Seeds that training does not reach.
    calibration = [(make_sounds(BATCH, seed=1_000_000 + index)[0],) for index in range(8)]
    # Whole batches: the integer convolutions of torch 2.13's Inductor fail where the batch size varies.
    sounds, labels = make_sounds(batches * BATCH, seed=2_000_000)

    # 1. Capture, and rewrite exactly so that the block can bear few bits.
    graph = mq_ao.export(model, calibration[0]).module(check_guards=False)
    print(mq_ao.graph.match(graph).describe())
    rewrite = mq_ao.passes.apply(graph, chosen.passes, calibration)
    print("\n".join(map(str, rewrite.transforms)))

    # 2. torchao's pt2e flow, with two quantizers.
    prepared = prepare_pt2e(graph, quantizers(chosen.scheme))
    calibrate(prepared, calibration, progress=True)
    converted = convert_pt2e(prepared)

    # 3. One compiled program: our integer operators, and oneDNN's integer convolutions where Inductor finds them.
    integer = inductor.rewrite(converted)
    compiled = inductor.compiled(converted, calibration[0])

    reference = log_probabilities(model, sounds)
    kept = compare(log_probabilities(compiled, sounds), reference, labels)
    right = float((reference.argmax(-1) == labels).double().mean())
    out().print(
        f"{len(labels)} new sounds: {right:.2%} right in float32, {kept.accuracy:.2%} in int8; the same answer for "
        f"{kept.agreement:.2%}, mean KL {kept.divergence:.5f} nats.\nInteger kernels of mq-ao: "
        f"{kernel_counts(integer.kernels)}. Left to Inductor: {', '.join(integer.simulated) or 'nothing'}.",
        markup=False,
    )


if __name__ == "__main__":
    typer.run(main)
