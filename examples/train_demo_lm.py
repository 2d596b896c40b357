"""Trains the bundled demo model: a byte-level Mamba on the sources of Python's standard library.

Examples:

    python examples/train_demo_lm.py --minutes 100 --out runs/demo

    python examples/train_demo_lm.py --until 01:00 --out runs/demo --resume    # UTC

    python examples/train_demo_lm.py --steps 50 --d-model 64 --layers 2 --out runs/try    # a quick look
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from demo_card import Result, model_card
from demo_corpus import collect, joined, repeated_lines
from torch import Tensor, nn
from training import (
    Batches,
    Plan,
    Schedule,
    console,
    load_checkpoint,
    muon,
    progress_bar,
    save_checkpoint,
    say,
    seconds_until,
)

from mq_ao.evaluate import bits_per_byte, xz_bits_per_byte
from mq_ao.files import write_atomically
from mq_ao.models import MambaConfig, MambaLM, Sampling, generate
from mq_ao.models.saving import save_pretrained

REPORT_SECONDS = 30


@dataclass(frozen=True)
class TextPlan(Plan):
    """How to train, on windows of `length` bytes."""

    length: int


FOCUS = 0.45
"""In this last part of a run, only text like that which the model is measured on is trained on."""


def loss_of(model: MambaLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats; matrix products in bfloat16, the rest in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, _ = model(inputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def sample(model: MambaLM, prompt: str, size: int = 600) -> str:
    """A continuation of `prompt`, which begins a document."""
    ids = torch.tensor([list(b"\0" + prompt.encode())])
    tokens = generate(model, ids, size, Sampling(temperature=0.7, top_p=0.95, seed=1))
    return bytes(tokens[0, 1:].tolist()).decode(errors="replace")


class Run:
    """A training run: everything that changes while it goes on, and what it leaves.

    Args:
        config: shape of the model.
        plan: how to train.
        resume: go on from the checkpoint in `plan.out` if there is one.
    """

    def __init__(self, config: MambaConfig, plan: TextPlan, resume: bool) -> None:
        torch.manual_seed(plan.seed)
        plan.out.mkdir(parents=True, exist_ok=True)
        self.plan, self.corpus, self.model = plan, collect(), MambaLM(config)
        self.optimiser = muon(self.model, plan)
        self.checkpoint = plan.out / "checkpoint.pt"
        self.step, elapsed = 0, 0.0
        if resume and self.checkpoint.exists():
            self.step, elapsed = load_checkpoint(self.checkpoint, self.model, self.optimiser)
        self.schedule = Schedule(plan, elapsed)
        self.everything = Batches(joined(self.corpus.train), plan.length, plan.batch, plan.seed)
        self.focus = Batches(joined(self.corpus.modules), plan.length, plan.batch, plan.seed + 1)
        self.heldout = b"\0".join(self.corpus.heldout)
        self.result = self._first_result()

    def _first_result(self) -> Result:
        return Result(
            python=platform.python_version(),
            torch=torch.__version__,
            train_documents=len(self.corpus.train),
            train_bytes=sum(map(len, self.corpus.train)),
            module_documents=len(self.corpus.modules),
            module_bytes=sum(map(len, self.corpus.modules)),
            heldout_repeated=repeated_lines(self.corpus.train, self.corpus.heldout),
            xz_bpb=xz_bits_per_byte(self.heldout),
            seed=self.plan.seed,
            length=self.plan.length,
            batch=self.plan.batch,
            matrix_lr=self.plan.matrix_lr,
            other_lr=self.plan.other_lr,
        )

    def train(self) -> Result:
        """Trains until the time or the steps are over; writes checkpoint and artefact; returns figures.

        An interrupt (Ctrl-C) writes the checkpoint before it ends the run.
        """
        try:
            self._loop()
        except KeyboardInterrupt:
            self._save()
            say(f"interrupted after step {self.step}; --resume goes on from there")
            raise typer.Exit(130) from None
        self.result = replace(self.result, sample=sample(self.model, '"""'))
        self._write()
        return self.result

    def _loop(self) -> None:
        r, parameters = self.result, sum(p.numel() for p in self.model.parameters())
        say(f"{parameters:,} parameters; {r.train_bytes:,} training bytes, {r.module_bytes:,} in modules")
        say(f"held-out: {len(self.heldout):,} bytes, xz -9e {r.xz_bpb:.4f} bits per byte; step {self.step}")
        evaluated = reported = time.time()
        losses: list[float] = []
        with progress_bar() as progress:
            bar = progress.add_task("training", total=1.0)
            while (share := self.schedule.share(self.step)) < 1:
                losses.append(self._update(share))
                progress.update(bar, completed=share)
                now = time.time()
                if now - reported > REPORT_SECONDS:
                    rate = len(losses) * self.plan.batch * self.plan.length / (now - reported)
                    mean = sum(losses) / len(losses)
                    say(f"step {self.step} {share:6.1%} training bpb {mean:.4f}, {rate:,.0f} bytes/s")
                    reported, losses = now, []
                if now - evaluated > self.plan.eval_seconds:
                    self._write()
                    evaluated = reported = time.time()
                    losses = []

    def _update(self, share: float) -> float:
        """One optimiser step; returns its loss in bits per byte."""
        factor = self.schedule.factor(share)
        batches = self.focus if share > 1 - FOCUS else self.everything
        loss = loss_of(self.model, *batches(self.step))
        loss.backward()
        self.optimiser.step(factor)
        self.step += 1
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss is {loss.item()} at step {self.step}: lower the learning rates.")
        return loss.item() / math.log(2)

    def _save(self) -> None:
        save_checkpoint(self.checkpoint, self.model, self.optimiser, self.step, self.schedule.now())

    def _write(self) -> None:
        """Evaluates; writes the checkpoint and `plan.out`/demo: model, texts and card."""
        self._save()
        self.result = replace(
            self.result,
            steps=self.step,
            bytes_seen=self.step * self.plan.batch * self.plan.length,
            seconds=self.schedule.now(),
            heldout_bpb=bits_per_byte(self.model, self.heldout),
        )
        folder = self.plan.out / "demo"
        save_pretrained(self.model, folder)
        write_atomically(folder / "heldout.txt", self.heldout)
        write_atomically(folder / "calibration.txt", b"\0".join(self.corpus.calibration))
        write_atomically(folder / "MODEL_CARD.md", model_card(self.model.config, self.result).encode())
        say(f"step {self.step} held-out bpb {self.result.heldout_bpb:.4f}")


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and for demo/, the finished model.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Wall time; the learning rate has decayed at its end.")
    ] = 120.0,
    until: Annotated[str | None, typer.Option(help="End at this time of day (UTC, HH:MM) instead.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps, if that is earlier.")] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 192,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 7,
    d_state: Annotated[int, typer.Option(min=1, help="States a channel.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Bytes in a training window.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 8,
    matrix_lr: Annotated[float, typer.Option(help="Learning rate of the projections (Muon).")] = 5e-3,
    other_lr: Annotated[float, typer.Option(help="Learning rate of the other parameters (AdamW).")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the text.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    eval_minutes: Annotated[float, typer.Option(help="Time between evaluations (each writes demo/).")] = 10.0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out, if there is one.")] = False,
) -> None:
    """Trains a byte-level Mamba on Python's standard library and writes a model folder with its card."""
    torch.set_num_threads(threads)
    config = MambaConfig(vocab_size=256, d_model=d_model, n_layer=layers, d_state=d_state)
    plan = TextPlan(
        out=out,
        seconds=seconds_until(until) if until else 60 * minutes,
        steps=steps,
        length=length,
        batch=batch,
        matrix_lr=matrix_lr,
        other_lr=other_lr,
        seed=seed,
        eval_seconds=60 * eval_minutes,
    )
    result = Run(config, plan, resume).train()
    console.print(result.sample, markup=False, highlight=False)
    say(f"held-out bits per byte {result.heldout_bpb:.4f}, xz -9e {result.xz_bpb:.4f}; in {out / 'demo'}")


if __name__ == "__main__":
    typer.run(main)
