"""What the training scripts share: the schedule, the optimisers, checkpoints."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from mq_ao.models import MambaLM, Vim

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        out: folder for the checkpoint and the model.
        seconds: wall time left at the start of this process; the learning rate has decayed when it is over.
        steps: stop after this many optimiser steps; the schedule follows whichever end is nearer.
        batch: examples in a step.
        matrix_lr: Muon's learning rate, for the projections.
        other_lr: AdamW's learning rate, for everything else.
        seed: seed of the weights and of the order of the examples.
        eval_seconds: time between evaluations.
    """

    out: Path
    seconds: float
    steps: int | None
    batch: int
    matrix_lr: float
    other_lr: float
    seed: int
    eval_seconds: float


class Schedule:
    """Learning-rate factor by the share of the run that is over: short warmup, plateau, linear decay to zero.

    Going by wall time makes the decay end on time whatever else the machine does meanwhile.
    """

    warmup = 0.02
    decay = 0.65

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
    """Muon for the projections; AdamW for embeddings, convolutions, the scan's parameters, norms."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        matrices = [p for name, p in model.named_parameters() if "proj" in name and p.dim() == 2]
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


def save_checkpoint(path: Path, model: MambaLM | Vim, optimiser: Optimiser, step: int, elapsed: float) -> None:
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


def load_checkpoint(path: Path, model: MambaLM | Vim, optimiser: Optimiser) -> tuple[int, float]:
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


def progress_bar() -> Progress:
    """A bar that shows how much of a run is over and how long the rest takes."""
    return Progress(TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console)


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
