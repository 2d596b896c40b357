"""What the training scripts share: batches of text, the schedule, the optimisers, checkpoints."""

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
from torch import Tensor, nn

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
    """Optimisers of disjoint parts of a model that are stepped together; each group's rate is its `lr` times a factor.

    Args:
        parts: the optimisers.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.rates = [[group["lr"] for group in part.param_groups] for part in parts]

    def step(self, factor: float) -> None:
        """Clips, updates and clears the gradients."""
        groups = [group for part in self.parts for group in part.param_groups]
        nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], 1.0)
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)


def muon(model: nn.Module, plan: Plan) -> Optimiser:
    """Muon for the projections; AdamW for embeddings, convolutions, the scan's parameters, norms."""
    matrices, others = _projections(model)
    return Optimiser(
        [
            torch.optim.Muon(matrices, lr=plan.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=plan.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
    )


def adamw(model: nn.Module, rate: float) -> Optimiser:
    """AdamW, as public checkpoints are trained; weight decay 0.1 on the projections alone.

    Its second moments are averaged over more steps than usual, for small batches.
    """
    matrices, others = _projections(model)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return Optimiser([torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)])


def _projections(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of the projections, and all others."""
    matrices = [p for name, p in model.named_parameters() if "proj" in name and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


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


class Batches:
    """Random access to batches of windows of a text of tokens.

    An epoch cuts the text into windows at a random offset and visits each once in a random order; both follow
    from the seed and the epoch's number. So a batch is a function of its step alone, and a resumed run goes
    on where it stopped.
    """

    def __init__(self, text: Tensor, length: int, batch: int, seed: int) -> None:
        self.text, self.length, self.batch, self.seed = text, length, batch, seed
        self.windows = (len(text) - 1) // length - 1
        self.epoch = -1
        self.order = torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, each (batch, length) int64."""
        starts = [self._start(step * self.batch + row) for row in range(self.batch)]
        rows = torch.stack([self.text[start : start + self.length + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def _start(self, window: int) -> int:
        epoch, index = divmod(window, self.windows)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(self.length, (1,), generator=generator)
            self.order = torch.randperm(self.windows, generator=generator) * self.length + offset
            self.epoch = epoch
        return int(self.order[index])
