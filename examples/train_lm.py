"""Trains a Mamba or Mamba-2 of about 8 million parameters on the text that text_corpus.py collects.

The rate is warmed up and then stays (WSD: Hu et al. 2024, MiniCPM), so training goes on for as long as there
is time, over many runs. `--cooldown` takes the rate to zero from wherever training is, in a branch of its own: what it
gives is the finished model, and training can go on afterwards as if it had not been.

Examples:

    python examples/train_lm.py --corpus runs/corpus --out runs/lm --minutes 60    # again to go on

    python examples/train_lm.py --corpus runs/corpus --out runs/lm --cooldown 2000    # finishes a model

    python examples/train_lm.py --architecture mamba2 --corpus runs/corpus --out runs/lm2 --minutes 60
"""

from __future__ import annotations

import copy
import csv
import json
import math
import platform
import signal
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from lm_card import Result, model_card
from lm_tokens import END, read_split, token_ids, tokenizer_of
from torch import Tensor, nn
from training import Batches, adamw, console, load_checkpoint, progress_bar, save_checkpoint, say

from mq_ao.evaluate import evaluate
from mq_ao.files import write_atomically
from mq_ao.models import Mamba2Config, MambaConfig, MambaLM, Sampling
from mq_ao.models.mamba2 import language_model
from mq_ao.models.saving import save_pretrained
from mq_ao.text import codec_for, read_tokens

REPORT_SECONDS = 60
WARMUP = 200
"""Steps in which the rate rises."""


class Architecture(StrEnum):
    """Which scan."""

    MAMBA = "mamba"
    MAMBA2 = "mamba2"


class Size(StrEnum):
    """About how many parameters."""

    TINY = "tiny"
    M8 = "8m"


SHAPES: dict[tuple[Architecture, Size], MambaConfig | Mamba2Config] = {
    (Architecture.MAMBA, Size.TINY): MambaConfig(vocab_size=512, d_model=32, n_layer=2),
    (Architecture.MAMBA, Size.M8): MambaConfig(vocab_size=4096, d_model=256, n_layer=15),
    (Architecture.MAMBA2, Size.TINY): Mamba2Config(vocab_size=512, d_model=32, n_layer=2, d_state=16, headdim=16),
    (Architecture.MAMBA2, Size.M8): Mamba2Config(vocab_size=4096, d_model=256, n_layer=15, d_state=64, headdim=32),
}


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        out: folder for the checkpoints, the log and the model.
        corpus: folder that text_corpus.py wrote.
        seconds: end after so much wall time; None: none.
        steps: end at this step of the stable phase; None: none.
        cooldown: steps in which the rate falls to zero; 0: it stays.
        length: tokens in a window.
        batch: windows in a step.
        rate: learning rate.
        seed: seed of the weights and of the order of the text.
        bfloat16: compute in bfloat16 where autocast does; weights and moments stay float32.
        save_seconds: time between checkpoints.
        eval_seconds: time between evaluations.
    """

    out: Path
    corpus: Path
    seconds: float | None
    steps: int | None
    cooldown: int
    length: int
    batch: int
    rate: float
    seed: int
    bfloat16: bool
    save_seconds: float
    eval_seconds: float


class Run:
    """A training run: everything that changes while it goes on, and what it leaves.

    Args:
        config: shape of the model.
        plan: how to train.
    """

    def __init__(self, config: MambaConfig | Mamba2Config, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        plan.out.mkdir(parents=True, exist_ok=True)
        self.plan, self.model = plan, language_model(config)
        self.tokenizer = tokenizer_of(plan.corpus, config.vocab_size)
        tokens = token_ids(plan.corpus, self.tokenizer)
        self.batches = Batches(tokens, plan.length, plan.batch, plan.seed)
        say(f"{sum(p.numel() for p in self.model.parameters()):,} parameters; {len(tokens):,} tokens of text")
        self.optimiser = adamw(self.model, plan.rate)
        self.step, self.elapsed = 0, 0.0
        self.checkpoint = plan.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.step, self.elapsed = load_checkpoint(self.checkpoint, self.model, self.optimiser)
        self.stable_steps = self.step
        if plan.cooldown:
            # A cooldown is another one if training went on since, or if it is to be longer.
            self.checkpoint = plan.out / f"cooldown-{self.step}-{plan.cooldown}.pt"
            if self.checkpoint.exists():
                self.step, self.elapsed = load_checkpoint(self.checkpoint, self.model, self.optimiser)
        self.folder = plan.out / ("model" if plan.cooldown else "latest")
        self.started = time.time()

    @property
    def seconds(self) -> float:
        """Wall time of the run, that of earlier processes included."""
        return self.elapsed + time.time() - self.started

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.plan.batch * self.plan.length

    def factor(self) -> float:
        """Learning-rate factor of the next step."""
        if self.plan.cooldown:
            return 1 - (self.step - self.stable_steps) / self.plan.cooldown
        return min(1.0, (self.step + 1) / WARMUP)

    def share(self) -> float:
        """Share of this process that is over; 0 where it has no end."""
        if self.plan.cooldown:
            return (self.step - self.stable_steps) / self.plan.cooldown
        by_time = (time.time() - self.started) / self.plan.seconds if self.plan.seconds else 0.0
        return max(by_time, self.step / self.plan.steps if self.plan.steps else 0.0)

    def train(self) -> None:
        """Trains until time or steps are over, or until it is interrupted, and writes the checkpoint."""
        say(f"from step {self.step}, {self.tokens:,} tokens seen; checkpoint {self.checkpoint}")
        try:
            self._loop()
        except KeyboardInterrupt:
            self.save()
            say(f"interrupted after step {self.step}; the same command goes on from there")
            raise typer.Exit(130) from None
        self.save()
        self.export()

    def _loop(self) -> None:
        saved = evaluated = reported = time.time()
        losses: list[float] = []
        with progress_bar() as progress:
            bar = progress.add_task("training", total=1.0)
            while (share := self.share()) < 1:
                losses.append(self._update())
                progress.update(bar, completed=share)
                now = time.time()
                if now - reported > REPORT_SECONDS:
                    rate = len(losses) * self.plan.batch * self.plan.length / (now - reported)
                    self._log("train", sum(losses) / len(losses))
                    say(f"step {self.step} loss {sum(losses) / len(losses):.4f} nats a token, {rate:,.0f} tokens/s")
                    reported, losses = now, []
                if now - saved > self.plan.save_seconds:
                    self.save()
                    saved = now
                if now - evaluated > self.plan.eval_seconds:
                    self.export()
                    evaluated = reported = time.time()
                    losses = []

    def _update(self) -> float:
        """One step; returns its loss in nats a token."""
        inputs, targets = self.batches(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.bfloat16):
            logits, _, _ = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss is {loss.item()} at step {self.step}: lower the learning rate.")
        self.optimiser.step(self.factor())
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Writes the checkpoint."""
        save_checkpoint(self.checkpoint, self.model, self.optimiser, self.step, self.seconds)

    def export(self) -> None:
        """Writes the model in bfloat16 with its tokenizer, its texts, and its card, which says how good it is."""
        model = copy.deepcopy(self.model).bfloat16()
        save_pretrained(model, self.folder)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
        files = {
            "tokenizer.json": self.tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
            "heldout.txt": END.encode().join(read_split(self.plan.corpus, "heldout")),
            "calibration.txt": END.encode().join(read_split(self.plan.corpus, "calibration")),
        }
        for name, content in files.items():
            write_atomically(self.folder / name, content)
        stored = MambaLM.from_pretrained(self.folder)
        codec = codec_for(stored.config.vocab_size, source=self.folder)
        cost = evaluate(stored, read_tokens(self.folder / "heldout.txt", stored.config.vocab_size, codec))
        result = Result(
            config=stored.config,
            parameters=sum(p.numel() for p in stored.parameters()),
            python=platform.python_version(),
            torch=torch.__version__,
            seed=self.plan.seed,
            length=self.plan.length,
            batch=self.plan.batch,
            rate=self.plan.rate,
            bfloat16=self.plan.bfloat16,
            stable_steps=self.stable_steps if self.plan.cooldown else self.step,
            cooldown_steps=self.step - self.stable_steps if self.plan.cooldown else 0,
            text_tokens=len(self.batches.text),
            seconds=self.seconds,
            heldout_bpb=cost.bits_per_byte or math.nan,
            heldout_perplexity=cost.perplexity,
            sample=self._sample(stored, "The function"),
        )
        write_atomically(self.folder / "MODEL_CARD.md", model_card(result, self.plan.corpus).encode())
        self._log("heldout", cost.nats / cost.tokens)
        say(f"step {self.step} held-out: {cost.bits_per_byte:.4f} bits per byte, perplexity {cost.perplexity:.2f}")

    def _sample(self, model: MambaLM, prompt: str, size: int = 150) -> str:
        ids = torch.tensor([[0, *self.tokenizer.encode(prompt).ids]])
        tokens: Tensor = model.generate(ids, size, Sampling(temperature=0.7, top_p=0.95, seed=1))
        text: str = self.tokenizer.decode(tokens[0].tolist())
        return text

    def _log(self, what: str, loss: float) -> None:
        """Adds a line to log.csv: what, step, tokens, seconds, nats a token."""
        path = self.plan.out / "log.csv"
        with path.open("a", newline="") as file:
            what = f"{what} of cooldown" if self.plan.cooldown else what
            csv.writer(file).writerow([what, self.step, self.tokens, round(self.seconds), round(loss, 4)])


def main(
    *,
    corpus: Annotated[Path, typer.Option(help="Folder that text_corpus.py wrote.")] = Path("runs/corpus"),
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint, latest/ (while training) and model/ (after a cooldown).")
    ] = Path("runs/lm"),
    architecture: Annotated[Architecture, typer.Option(help="Mamba-1 or Mamba-2.")] = Architecture.MAMBA,
    size: Annotated[Size, typer.Option(help="About how many parameters; tiny is for a quick look.")] = Size.M8,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="End after so much wall time.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End at this step.")] = None,
    cooldown: Annotated[
        int, typer.Option(min=0, help="Take the rate to zero in so many steps, and finish a model.")
    ] = 0,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a training window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 4,
    rate: Annotated[float, typer.Option(help="Learning rate (AdamW).")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the text.")] = 0,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Autocast to bfloat16: faster where the CPU has instructions for it.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    save_minutes: Annotated[float, typer.Option(help="Time between checkpoints.")] = 4.0,
    eval_minutes: Annotated[float, typer.Option(help="Time between evaluations (each writes the model).")] = 30.0,
) -> None:
    """Trains a Mamba or Mamba-2 on text; goes on from the checkpoint in --out if there is one."""
    torch.set_num_threads(threads)
    for number in (signal.SIGTERM, signal.SIGINT):  # a process in the background may have SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    if not (corpus / "train.txt").exists():
        raise typer.BadParameter(
            f"there is no {corpus / 'train.txt'}: run examples/text_corpus.py --out {corpus} first."
        )
    plan = Plan(
        out=out,
        corpus=corpus,
        seconds=60 * minutes if minutes else None,
        steps=steps,
        cooldown=cooldown,
        length=length,
        batch=batch,
        rate=rate,
        seed=seed,
        bfloat16=bfloat16,
        save_seconds=60 * save_minutes,
        eval_seconds=60 * eval_minutes,
    )
    run = Run(SHAPES[architecture, size], plan)
    run.train()
    console.print(f"the model is in {run.folder}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
