"""Trains the bundled demo model: a byte-level Mamba on the sources of Python's standard library.

Examples:

    python examples/train_demo_lm.py --minutes 100 --out runs/demo

    python examples/train_demo_lm.py --until 01:00 --out runs/demo --resume    # UTC

    python examples/train_demo_lm.py --steps 50 --d-model 64 --layers 2 --out runs/try    # a quick look
"""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_card import Result, model_card
from demo_corpus import Batches, collect, repeated_lines
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mq_ao.evaluate import bits_per_byte, xz_bits_per_byte
from mq_ao.files import write_atomically
from mq_ao.models import MambaConfig, MambaLM, Sampling, generate
from mq_ao.models.saving import save_pretrained

REPORT_SECONDS = 30

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        out: folder for the checkpoint and the model.
        seconds: wall time left at the start of this process; the learning rate has decayed when it is over.
        steps: stop after this many optimiser steps; the schedule follows whichever end is nearer.
        length: bytes in a window.
        batch: windows in a step.
        matrix_lr: Muon's learning rate, for the projections.
        other_lr: AdamW's learning rate, for everything else.
        seed: seed of the weights and of the order of the windows.
        eval_seconds: time between evaluations.
    """

    out: Path
    seconds: float
    steps: int | None
    length: int
    batch: int
    matrix_lr: float
    other_lr: float
    seed: int
    eval_seconds: float


class Schedule:
    """Learning-rate factor by the share of the run that is over: short warmup, plateau, linear decay to zero.

    In the last part, `focus`, only text like that which the model is measured on is trained on.

    Going by wall time makes the decay end on time whatever else the machine does meanwhile.
    """

    warmup = 0.02
    decay = 0.65
    focus = 0.45

    def __init__(self, plan: Plan, elapsed: float) -> None:
        self.plan, self.elapsed, self.started = plan, elapsed, time.time()

    def now(self) -> float:
        """Seconds that the run has taken, earlier processes included."""
        return self.elapsed + time.time() - self.started

    def share(self, step: int) -> float:
        """Share of the run that is over, by time or by steps, whichever is further."""
        by_time = self.now() / (self.elapsed + self.plan.seconds)
        return max(by_time, step / self.plan.steps if self.plan.steps else 0.0)

    def factor(self, share: float) -> float:
        """Learning-rate factor in [0, 1]."""
        return max(0.0, min(1.0, share / self.warmup + 0.01, (1 - share) / self.decay))


class Optimiser:
    """Muon for the projections; AdamW for the embedding, the convolution, the scan's parameters, norms."""

    def __init__(self, model: MambaLM, plan: Plan) -> None:
        matrices = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.parameters = matrices + others
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=plan.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=plan.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.rates = (plan.matrix_lr, plan.other_lr)

    def step(self, factor: float) -> None:
        """Clips, updates and clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)


def loss_of(model: MambaLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats; matrix products in bfloat16, the rest in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, _ = model(inputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def save_checkpoint(path: Path, model: MambaLM, optimiser: Optimiser, step: int, elapsed: float) -> None:
    """Writes everything that a resumed run needs, under a temporary name first."""
    state = {
        "config": model.config.to_dict(),
        "model": model.state_dict(),
        "optimisers": [part.state_dict() for part in optimiser.parts],
        "step": step,
        "elapsed": elapsed,
    }
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: MambaLM, optimiser: Optimiser) -> tuple[int, float]:
    """Restores a run; returns its step and elapsed seconds."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["config"] != model.config.to_dict():
        raise typer.BadParameter(
            f"{path} is of a model with {state['config']}: give the same options, or another --out."
        )
    model.load_state_dict(state["model"])
    for part, saved in zip(optimiser.parts, state["optimisers"], strict=True):
        part.load_state_dict(saved)
    return state["step"], state["elapsed"]


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

    def __init__(self, config: MambaConfig, plan: Plan, resume: bool) -> None:
        torch.manual_seed(plan.seed)
        plan.out.mkdir(parents=True, exist_ok=True)
        self.plan, self.corpus, self.model = plan, collect(), MambaLM(config)
        self.optimiser = Optimiser(self.model, plan)
        self.checkpoint = plan.out / "checkpoint.pt"
        self.step, elapsed = 0, 0.0
        if resume and self.checkpoint.exists():
            self.step, elapsed = load_checkpoint(self.checkpoint, self.model, self.optimiser)
        self.schedule = Schedule(plan, elapsed)
        self.everything = Batches(self.corpus.train, plan.length, plan.batch, plan.seed)
        self.focus = Batches(self.corpus.modules, plan.length, plan.batch, plan.seed + 1)
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
            heldout_repeated=repeated_lines(self.corpus),
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
        columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        evaluated = reported = time.time()
        losses: list[float] = []
        with Progress(*columns, console=console) as progress:
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
        batches = self.focus if share > 1 - Schedule.focus else self.everything
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


def say(line: str) -> None:
    """Prints a line with the time of day, above the progress bar."""
    console.print(f"{datetime.now(UTC):%H:%M:%S} {line}", highlight=False)


def seconds_until(clock: str) -> float:
    """Seconds from now to the next time that UTC clocks show `clock` (HH:MM)."""
    now = datetime.now(UTC)
    try:
        end = datetime.combine(now.date(), datetime.strptime(clock, "%H:%M").time(), UTC)
    except ValueError as error:
        raise typer.BadParameter(f"{clock!r} is no time of day: give HH:MM (UTC).") from error
    return ((end if end > now else end + timedelta(days=1)) - now).total_seconds()


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
    plan = Plan(
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
