"""Trains the bundled Vision Mamba on Fashion-MNIST.

Examples:

    sudo apt install dataset-fashion-mnist

    python examples/train_vim_fashion.py --minutes 90 --out runs/vim

    python examples/train_vim_fashion.py --minutes 30 --out runs/vim --resume

    python examples/train_vim_fashion.py --steps 50 --d-model 32 --layers 2 --out runs/try    # a quick look
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import typer
from fashion_data import CALIBRATION, FOLDER, SHIPPED, VALIDATION, Images, read
from torch import Tensor, nn
from training import Plan, Schedule, load_checkpoint, muon, progress_bar, save_checkpoint, say
from vim_card import Result, model_card

from mq_ao.files import write_atomically
from mq_ao.models import Vim, VimConfig
from mq_ao.models.vision_demo import normalised

REPORT_SECONDS = 30
SMOOTHING = 0.1
"""Of the labels, in the loss."""
SHIFT = 2
"""Pixels by which training images are moved at most."""


class Augmented:
    """Batches of training images, mirrored and moved at random; what a step sees is a function of its number.

    Args:
        images: the training images.
        batch: images of a step.
        seed: of order and changes.
    """

    def __init__(self, images: Images, batch: int, seed: int) -> None:
        self._images, self._batch, self._seed = images, batch, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self._images) // self._batch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """(images (batch, 1, 28, 28) float32, labels (batch,))."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self._images), generator=self._generator(epoch, 0))
        chosen = self._order[place * self._batch : (place + 1) * self._batch]
        gen = self._generator(epoch, place + 1)
        images = normalised(self._images.pixels[chosen])
        mirrored = torch.rand(len(chosen), generator=gen) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        side = images.shape[-1]
        padded = nn.functional.pad(images, [SHIFT] * 4, value=float(images.min()))
        rows, columns = (
            torch.randint(0, 2 * SHIFT + 1, (2, len(chosen), 1), generator=gen) + torch.arange(side)
        ).unbind()
        moved = padded[torch.arange(len(chosen))[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
        return moved.unsqueeze(1), self._images.labels[chosen]

    def _generator(self, epoch: int, place: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000 + epoch) * 100_000 + place)


@torch.no_grad()
def accuracy(model: Vim, images: Images, batch: int = 250) -> float:
    """Share of images that the model classifies as labelled."""
    model.eval()
    right = 0
    for start in range(0, len(images), batch):
        part = images.part(start, start + batch)
        right += int((model(normalised(part.pixels)).argmax(-1) == part.labels).sum())
    model.train()
    return right / len(images)


@dataclass(frozen=True)
class Data:
    """What is trained, validated and tested on."""

    train: Images
    validation: Images
    test: Images

    @classmethod
    def of(cls, folder: Path) -> Data:
        """From Fashion-MNIST's files."""
        given = read(folder, "train")
        split = len(given) - VALIDATION
        return cls(given.part(0, split), given.part(split, len(given)), read(folder, "t10k"))


class Run:
    """A training run: everything that changes while it goes on, and what it leaves.

    Args:
        config: shape of the model.
        plan: how to train.
        data: what to train on.
        resume: go on from the checkpoint in `plan.out` if there is one.
    """

    def __init__(self, config: VimConfig, plan: Plan, data: Data, resume: bool) -> None:
        torch.manual_seed(plan.seed)
        plan.out.mkdir(parents=True, exist_ok=True)
        self.plan, self.data, self.model = plan, data, Vim(config)
        self.optimiser = muon(self.model, plan)
        self.checkpoint = plan.out / "checkpoint.pt"
        self.step, elapsed = 0, 0.0
        if resume and self.checkpoint.exists():
            self.step, elapsed = load_checkpoint(self.checkpoint, self.model, self.optimiser)
        self.schedule = Schedule(plan, elapsed)
        self.batches = Augmented(data.train, plan.batch, plan.seed)
        self.result = Result(
            python=platform.python_version(),
            torch=torch.__version__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            train=len(data.train),
            batch=plan.batch,
            seed=plan.seed,
            matrix_lr=plan.matrix_lr,
            other_lr=plan.other_lr,
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
        # The test images are looked at once, by the finished model.
        self.result = replace(self.result, test=accuracy(self.model, self.data.test))
        self._write()
        return self.result

    def _loop(self) -> None:
        say(f"{self.result.parameters:,} parameters; {self.batches.steps} steps an epoch; step {self.step}")
        evaluated = reported = time.time()
        losses: list[float] = []
        with progress_bar() as progress:
            bar = progress.add_task("training", total=1.0)
            while (share := self.schedule.share(self.step)) < 1:
                losses.append(self._update(self.schedule.factor(share)))
                progress.update(bar, completed=share)
                now = time.time()
                if now - reported > REPORT_SECONDS:
                    rate = len(losses) * self.plan.batch / (now - reported)
                    say(f"step {self.step} {share:6.1%} loss {sum(losses) / len(losses):.4f}, {rate:,.0f} images/s")
                    reported, losses = now, []
                if now - evaluated > self.plan.eval_seconds:
                    self._write()
                    evaluated = reported = time.time()
                    losses = []

    def _update(self, factor: float) -> float:
        """One optimiser step; returns its loss in nats."""
        images, labels = self.batches(self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        loss.backward()
        self.optimiser.step(factor)
        self.step += 1
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss is {loss.item()} at step {self.step}: lower the learning rates.")
        return loss.item()

    def _save(self) -> None:
        save_checkpoint(self.checkpoint, self.model, self.optimiser, self.step, self.schedule.now())

    def _write(self) -> None:
        """Validates; writes the checkpoint and `plan.out`/vision_demo: model, images and card."""
        self._save()
        self.result = replace(
            self.result,
            steps=self.step,
            epochs=self.step / self.batches.steps,
            seconds=self.schedule.now(),
            validation=accuracy(self.model, self.data.validation),
        )
        folder = self.plan.out / "vision_demo"
        self.model.save_pretrained(folder)
        shipped = {
            "test_images": self.data.test.pixels[:SHIPPED],
            "test_labels": self.data.test.labels[:SHIPPED].to(torch.uint8),
            "calibration_images": self.data.train.pixels[:CALIBRATION],
        }
        write_atomically(folder / "images.safetensors", safetensors.torch.save(shipped))
        write_atomically(folder / "MODEL_CARD.md", model_card(self.model.config, self.result).encode())
        say(f"step {self.step} ({self.result.epochs:.1f} epochs) validation accuracy {self.result.validation:.4f}")


def main(
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint and for vision_demo/, the finished model.")
    ] = Path("runs/vim"),
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = FOLDER,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Wall time; the learning rate has decayed at its end.")
    ] = 90.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps, if that is earlier.")] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 96,
    layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 6,
    d_state: Annotated[int, typer.Option(min=1, help="States a channel.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 128,
    matrix_lr: Annotated[float, typer.Option(help="Learning rate of the projections (Muon).")] = 5e-3,
    other_lr: Annotated[float, typer.Option(help="Learning rate of the other parameters (AdamW).")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the images.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    eval_minutes: Annotated[float, typer.Option(help="Time between validations (each writes vision_demo/).")] = 10.0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out, if there is one.")] = False,
) -> None:
    """Trains a Vision Mamba on Fashion-MNIST and writes a model folder with its card."""
    torch.set_num_threads(threads)
    config = VimConfig(
        image_size=28, patch_size=4, in_channels=1, num_classes=10, d_model=d_model, n_layer=layers, d_state=d_state
    )
    plan = Plan(
        out=out,
        seconds=60 * minutes,
        steps=steps,
        batch=batch,
        matrix_lr=matrix_lr,
        other_lr=other_lr,
        seed=seed,
        eval_seconds=60 * eval_minutes,
    )
    result = Run(config, plan, Data.of(data), resume).train()
    say(f"test accuracy {result.test:.4f} on 10,000 images; in {out / 'vision_demo'}")


if __name__ == "__main__":
    typer.run(main)
