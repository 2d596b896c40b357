"""Damaged files: python -m tests.fuzzing [--count 10000] [--seed 0] [--kinds ptn,yaml].

Small programs, checkpoints and recipes are written once. Then copies are damaged in ways that a seed draws, and each is
opened and used in another process: it has to work, or to be refused by an `MqAoError`. Any other exception, a crash and
a hang are failures, and are printed with the seed, which alone makes the same damage again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mq_ao
from mq_ao import MqAoError
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.recipe_files import read_recipe, to_yaml
from mq_ao.recipes import get_recipe
from tests.conftest import tokens

PATIENCE = 120
"""Seconds that one file may take."""


def damaged(content: bytes, seed: int) -> bytes:
    """The file with one to four of: bytes changed, left out, doubled or filled in, numbers changed, the end cut off."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        # Beginnings and ends hold what the rest is read by.
        size = len(content)
        near = min(size, 4096)
        at = draw.choice([draw.randrange(size + 1), draw.randrange(near + 1), size - draw.randrange(near + 1)])
        length = draw.choice([1, 1, 2, 4, 8, 64, 1024])
        before, hit, after = content[:at], content[at : at + length], content[at + length :]
        other = draw.choice([draw.randbytes(len(hit)), bytes(len(hit)), b"\xff" * len(hit), hit + hit, b""])
        match draw.randrange(8):
            case 0:
                content = before
            case 1 | 2:
                content = before + _another_number(hit + after, draw)
            case _:
                content = before + other + after
    return content


def _another_number(content: bytes, draw: random.Random) -> bytes:
    """With the first number that is written out changed: it may be a size, an offset, or a place in a plan."""
    number = draw.choice([0, 1, -1, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**64, -(2**63), 10**30, 1e300, "null", '"x"'])
    return re.sub(rb"\d+", str(number).encode(), content, count=1)


@dataclass(frozen=True)
class Kind:
    """Files of a format.

    Attributes:
        make: writes one into a folder, and returns its path.
        use: opens one and uses what it holds.
    """

    make: Callable[[Path], Path]
    use: Callable[[Path], Any]


def _model() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=64, d_model=16, n_layer=1)).eval()


def _program(backend: str, suffix: str) -> Kind:
    def make(folder: Path) -> Path:
        path = folder / f"program{suffix}"
        calibration = [tokens(2, 16) % 64]
        mq_ao.quantize(_model(), calibration, "mambaquant-w4a8", backend=backend).lower().save(path)
        return path

    def use(path: Path) -> None:
        program = mq_ao.load(path)
        _, *states = program.prefill(tokens(1, 3) % 64)
        program.decode(tokens(1, 1) % 64, *states)

    return Kind(make, use)


def _make_checkpoint(folder: Path) -> Path:
    _model().save_pretrained(folder / "checkpoint")
    return folder / "checkpoint/model.safetensors"


def _use_checkpoint(path: Path) -> None:
    MambaLM.from_pretrained(path.parent)(tokens(1, 3) % 64)


def _make_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(get_recipe("mambaquant-w4a8")))
    return path


KINDS = {
    "ptn": _program("native", ".ptn"),
    "ptc": _program("cuda", ".ptc"),
    "pte": _program("executorch", ".pte"),
    "pt2": _program("inductor", ".pt2"),
    "safetensors": Kind(_make_checkpoint, _use_checkpoint),
    "yaml": Kind(_make_recipe, read_recipe),
}


def outcome(kind: str, path: Path, content: bytes, seed: int) -> str | None:
    """What is wrong with how a damaged file is taken; None: nothing. The file is written over."""
    path.write_bytes(damaged(content, seed))
    try:
        KINDS[kind].use(path)
    except MqAoError as error:
        return None if str(error).strip() else "an error without a message"
    except Exception as error:  # that is what is looked for
        return f"{type(error).__name__}: {error}"
    return None


def work(kind: str, path: Path, seeds: range) -> None:
    """Prints a line of JSON before and after every file."""
    content = path.read_bytes()
    for seed in seeds:
        print(json.dumps({"seed": seed}), flush=True)
        print(json.dumps({"seed": seed, "wrong": outcome(kind, path, content, seed)}), flush=True)


def failures(kind: str, seeds: range) -> Iterator[tuple[int, str]]:
    """Seeds whose files were not taken as they should be, and what happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        made = KINDS[kind].make(Path(folder))
        content, first = made.read_bytes(), seeds.start
        while first < seeds.stop:
            made.write_bytes(content)
            command = [sys.executable, "-m", "tests.fuzzing", "--work", kind, str(made), str(first), str(seeds.stop)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
                assert worker.stdout is not None
                running = None
                while True:
                    # A process that begins takes as long again.
                    ready, _, _ = select.select(
                        [worker.stdout], [], [], PATIENCE if running is not None else 2 * PATIENCE
                    )
                    line = worker.stdout.readline() if ready else ""
                    if not line:
                        break
                    told = json.loads(line)
                    running = told["seed"]
                    if "wrong" in told:
                        first, running = running + 1, None
                        if told["wrong"]:
                            yield told["seed"], told["wrong"]
                if ready and worker.wait() == 0:
                    return
                worker.kill()
                seed = first if running is None else running
                yield seed, f"a crash ({worker.wait()})" if ready else "a hang"
                first = seed + 1
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Runs all kinds, or is the process that opens files; returns the exit status."""
    if sys.argv[1:2] == ["--work"]:
        kind, path, first, stop = sys.argv[2:]
        work(kind, Path(path), range(int(first), int(stop)))
        return 0
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=10_000, help="damaged files, shared out to the kinds")
    options.add_argument("--seed", type=int, default=0, help="the first one's seed")
    options.add_argument("--kinds", default=",".join(KINDS), help="of files, separated by commas")
    given = options.parse_args()
    kinds, wrong = given.kinds.split(","), 0
    each = -(-given.count // len(kinds))
    for kind in kinds:
        found = 0
        for seed, what in failures(kind, range(given.seed, given.seed + each)):
            print(f"{kind}, seed {seed}: {what}", flush=True)
            found += 1
        print(f"{kind}: {each} files, {found} failures", flush=True)
        wrong += found
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
