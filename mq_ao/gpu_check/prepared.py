"""Programs of the bundled models, and what they give on the CPU: made here, or beforehand and carried along.

They are the programs that a GPU runs, `.ptc`, and the CPU runs them by its own kernels where those are built, else by
the operators' references. So what differs are kernels alone: the integers are the same. A file of another version of
PyTorch is refused where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mq_ao import api
from mq_ao.bench.prepare import calibration_of
from mq_ao.classify import BATCH
from mq_ao.errors import MqAoError
from mq_ao.evaluate import evaluate
from mq_ao.files import replacing
from mq_ao.gpu_check.settings import Setting, Sizes
from mq_ao.lowering.cuda import CudaModule, CudaProgram
from mq_ao.models import MambaLM, Vim, demo, vision_demo
from mq_ao.roofline import random_model
from mq_ao.text import byte_text

RECIPES = ("mambaquant-w8a8", "mambaquant-w4a8")
"""How the bundled language model is quantized."""

VIM = "mambaquant-w8a8"
"""How the bundled classifier is."""

PREPARED_TEXT = 65536
"""Bytes of held-out text for programs that are prepared, which may take its time."""

Step = Callable[[str], AbstractContextManager[object]]


def language_file(recipe: str) -> str:
    """Name of the language model's program."""
    return f"language-{recipe}.ptc"


VISION_FILE = "vision.ptc"


def expected_file(program: str) -> str:
    """Name of the file with what a program gives on the CPU."""
    return f"{program}.safetensors"


def prepare(sizes: Sizes, folder: Path, step: Step) -> None:
    """Makes everything.

    Args:
        sizes: how much of everything.
        folder: where to; it is there.
        step: shows the user what is being done.

    Raises:
        MqAoError: a model cannot be read or quantized, or a file cannot be written.
    """
    for recipe in RECIPES:
        with step(f"the language model in {recipe}"):
            prepare_language(sizes, recipe, folder)
    with step("the image classifier"):
        prepare_vision(sizes, folder)


def prepare_language(sizes: Sizes, recipe: str, folder: Path) -> None:
    """Quantizes the language model, and runs it on the CPU."""
    model = MambaLM.from_pretrained("demo")
    if not sizes.bundled:
        model = random_model(replace(model.config, d_model=64, n_layer=1))
    program = api.quantize(model, calibration_of(model, sizes.calibration), recipe, backend="cuda").lower()
    assert isinstance(program, CudaProgram)
    name = language_file(recipe)
    program.save(folder / name)
    expected = expected_of(program, prompt_of(sizes), sizes.text, sizes.written)
    _keep(expected, folder / expected_file(name))


def expected_of(program: CudaProgram, prompt: Tensor, text: int, written: int) -> dict[str, Tensor]:
    """Logits of a prompt, bits per byte of held-out text, and the likeliest continuation."""
    logits, *_ = program(prompt)
    return {
        "logits": logits.float().cpu(),
        "bytes": torch.tensor(text),
        "bits": torch.tensor(bits_per_byte(program, text), dtype=torch.float64),
        "written": program.generate(prompt, written).cpu(),
    }


def bits_per_byte(program: CudaProgram, text: int) -> float:
    """Of the first bytes of the held-out text."""
    found = byte_text(demo.HELDOUT.read_bytes()[:text])
    return evaluate(program, found).nats / math.log(2) / text


def prompt_of(sizes: Sizes) -> Tensor:
    """The beginning of the held-out text."""
    return torch.tensor([list(demo.HELDOUT.read_bytes()[: sizes.prompt])])


def images_of(sizes: Sizes) -> Sequence[Tensor]:
    """Images that the classifier has not seen, in batches."""
    return vision_demo.normalised(load_file(vision_demo.IMAGES)["test_images"][: sizes.images]).split(BATCH)


def prepare_vision(sizes: Sizes, folder: Path) -> None:
    """Quantizes the classifier, and runs it on the CPU."""
    model = Vim.from_pretrained("demo")
    if not sizes.bundled:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Vim(replace(model.config, d_model=32, n_layer=1, patch_size=14)).eval()
    calibration = vision_demo.normalised(load_file(vision_demo.IMAGES)["calibration_images"][: sizes.images]).split(
        BATCH
    )
    program = api.quantize(model, [(batch,) for batch in calibration], VIM, backend="cuda").lower()
    program.save(folder / VISION_FILE)
    assert isinstance(program, CudaModule)
    logits = torch.cat([program(batch) for batch in images_of(sizes)])
    _keep({"logits": logits.float()}, folder / expected_file(VISION_FILE))


def _keep(expected: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        save_file(expected, temporary)


@contextmanager
def prepared(setting: Setting, program: str, make: Callable[[Path], None]) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """A program's file and what is expected of it, made first where nothing was prepared.

    Raises:
        MqAoError: the folder that was prepared lacks it.
    """
    found = nullcontext(setting.prepared) if setting.prepared is not None else TemporaryDirectory(prefix="mq_ao_")
    with found as folder:
        path, expected = Path(folder) / program, Path(folder) / expected_file(program)
        if setting.prepared is None:
            make(Path(folder))
        elif not expected.is_file():
            raise MqAoError(f"there is no {expected}: make the folder again with mq-ao gpu-check --prepare.")
        yield path, load_file(expected)
