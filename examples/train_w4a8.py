"""Trains the bundled model with its quantization in the loop, so that 4-bit weights lose less.

    python examples/train_w4a8.py --steps 200 --output demo-trained-w4a8.ptn

It learns to give the float model's probabilities, on the text that the model was trained on: Python's standard library
on this machine, without the held-out modules that the result is measured on. Both programs that are measured run in
integers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from demo_corpus import collect, joined
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from training import Batches

from mq_ao import MqAoError, api
from mq_ao.cli.console import err, out, step
from mq_ao.evaluate import bits_per_byte
from mq_ao.files import check_output
from mq_ao.models import MambaLM, demo
from mq_ao.recipes import get_recipe
from mq_ao.text import BYTE_VOCABULARY, ByteCodec, calibration_batches, read_tokens
from mq_ao.training import TrainableModel


def main(
    recipe: Annotated[str, typer.Option(help="Name or file.")] = "mambaquant-w4a8",
    steps: Annotated[int, typer.Option(min=0)] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Bytes of a window.")] = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of the weights, at the start.")] = 2e-4,
    scale_rate: Annotated[float, typer.Option(min=0, help="Of the scales.")] = 2e-5,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Program to write, ending in .ptn.")] = None,
) -> None:
    """Measure quantization after training and in training, and write the trained program."""
    if output is not None:
        check_output(output, ".ptn")
    chosen = get_recipe(recipe)
    model = MambaLM.from_pretrained("demo")
    calibration = calibration_batches(read_tokens(demo.CALIBRATION, BYTE_VOCABULARY, ByteCodec()), 16384)
    with step(f"preparing ({chosen.name})"):
        trainable = api.prepare_qat(model, calibration, chosen)
    with step("measuring what is not trained"):
        held_out = demo.HELDOUT.read_bytes()
        exact = bits_per_byte(model, held_out)
        before = bits_per_byte(trainable.convert().lower(), held_out)
    train(trainable, model, Batches(joined(collect().train), length, batch, seed), steps, learning_rate, scale_rate)
    with step("converting, compiling and measuring"):
        program = trainable.convert().lower()
        after = bits_per_byte(program, held_out)
    console = out()
    console.print(f"float32: {exact:.4f} bits per byte of held-out text")
    for name, loss in (("quantized after training", before), (f"trained {steps} steps", after)):
        console.print(f"{chosen.name}, {name}: {loss:.4f} ({loss / exact - 1:+.2%})")
    if output is not None:
        program.save(output)


def train(
    trainable: TrainableModel, teacher: MambaLM, data: Batches, steps: int, learning_rate: float, scale_rate: float
) -> None:
    """Lowers the divergence from the teacher's probabilities."""
    groups = [{"params": trainable.weights, "lr": learning_rate}, {"params": trainable.scales, "lr": scale_rate}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    # A short warm-up, then to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * done / max(1, steps)))
    )
    for number in track(range(steps), description="training", console=err()):
        ids, _ = data(number)
        with torch.no_grad():
            wanted = teacher(ids)[0]
        optimizer.zero_grad()
        loss = divergence(trainable(ids)[0], wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % 20 == 0:
            err().print(f"step {number}: divergence {float(loss):.5f} nats a byte")


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || logits), nats a token."""
    ours, theirs = (values.flatten(0, 1).log_softmax(-1) for values in (logits, wanted))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MqAoError as error:
        raise SystemExit(f"error: {error}") from None
