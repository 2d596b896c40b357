"""Turns one model into the files that contenders open: all of them have the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path

import torch

from mq_ao import api
from mq_ao.backends import DEFAULT, INDUCTOR, NATIVE, get_backend
from mq_ao.bench.gguf_writer import write_f32
from mq_ao.bench.shapes import SHAPES, random_model
from mq_ao.bench.worker import Kind, Spec
from mq_ao.errors import MqAoError
from mq_ao.models import Logits, MambaConfig, MambaLM, demo, load
from mq_ao.models.saving import save_pretrained
from mq_ao.recipes import Recipe
from mq_ao.text import BYTE_VOCABULARY, ByteCodec, calibration_batches, read_tokens

FP32_EAGER, FP32, INT8 = "fp32 eager", "fp32 compiled", "int8"
"""Names of our own contenders; of several recipes each has its own name behind "int8"."""

TRANSFORMERS_EAGER = "transformers eager"
"""Name of the peer; of models that are transformers' own, the first contender."""

Step = Callable[[str], AbstractContextManager[object]]
"""Shows the user what is being done."""


class Peer(StrEnum):
    """Other libraries that run the same weights."""

    TRANSFORMERS = "transformers"
    LLAMA = "llama.cpp"


_MODULES = {Peer.TRANSFORMERS: ("transformers",), Peer.LLAMA: ("llama_cpp", "gguf")}


def installed_peers() -> list[Peer]:
    """The peers that can be benched here."""
    return [peer for peer, modules in _MODULES.items() if all(map(importlib.util.find_spec, modules))]


def parse_peers(names: Sequence[str]) -> list[Peer]:
    """Peers by name.

    Raises:
        MqAoError: one is unknown or not installed.
    """
    known = ", ".join(peer.value for peer in Peer)
    peers = []
    for name in names:
        try:
            peer = Peer(name)
        except ValueError:
            raise MqAoError(f"unknown peer {name!r}: the peers are {known}.") from None
        missing = [module for module in _MODULES[peer] if importlib.util.find_spec(module) is None]
        if missing:
            raise MqAoError(f'peer {name} needs {" and ".join(missing)}: run pip install "mq-ao[peers]".')
        peers.append(peer)
    return peers


def int8_names(recipes: Sequence[Recipe]) -> list[str]:
    """Names of our quantized contenders, one a recipe.

    Raises:
        MqAoError: two recipes have the same name.
    """
    names = [recipe.name for recipe in recipes]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise MqAoError(f"two recipes are called {twice}: give each once, and recipe files a `name` of their own.")
    return [INT8] if len(names) == 1 else [f"{INT8} ({name})" for name in names]


def is_int8(name: str) -> bool:
    """Whether a contender is one of `int8_names`."""
    return name == INT8 or name.startswith(f"{INT8} (")


def open_model(source: str) -> MambaLM | Logits:
    """A named shape with random weights, or `mq_ao.models.load(source)`."""
    if source in SHAPES:
        return random_model(source)
    model = load(source)
    return model if isinstance(model, MambaLM) else Logits(model)


def random_ids(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    """The same tokens on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def calibration_of(model: MambaLM | Logits, tokens: int = 4096) -> list[torch.Tensor]:
    """The bundled text for byte-level models; random tokens for the others, which are only timed."""
    if model.config.vocab_size == BYTE_VOCABULARY and demo.CALIBRATION.is_file():
        text = read_tokens(demo.CALIBRATION, BYTE_VOCABULARY, ByteCodec())
        return calibration_batches(text, tokens)
    ids = random_ids(model.config.vocab_size, tokens, seed=1)
    return list(torch.tensor(ids).reshape(-1, min(512, tokens)).split(1))


def prepare(
    model: MambaLM | Logits,
    folder: Path,
    *,
    recipes: Sequence[Recipe],
    peers: Sequence[Peer],
    threads: int,
    longest: int,
    backend: str = DEFAULT.name,
    step: Step | None = None,
) -> list[Spec]:
    """Writes what each contender opens into `folder`.

    Args:
        model: float model.
        folder: empty folder.
        recipes: how ours is quantized; each makes a contender.
        peers: other libraries to bench.
        threads: threads that every contender uses; compiled programs are compiled for them.
        longest: most tokens in a sequence.
        backend: what runs ours; in fp32 Inductor, where that is native.
        step: shows what is being done.

    Raises:
        MqAoError: the model cannot be quantized or written, or two recipes have the same name.
    """
    if peers and not isinstance(model.config, MambaConfig):
        raise MqAoError("peers are set up for Mamba-1 alone: bench this model with --peers none.")
    step = step or nullcontext
    torch.set_num_threads(threads)
    specs = []

    def add(name: str, kind: Kind, path: Path) -> None:
        specs.append(Spec(name, kind, path, threads, longest))

    with step("writing the float model"):
        if isinstance(model, MambaLM):
            save_pretrained(model, folder / "model")
            add(FP32_EAGER, Kind.EAGER, folder / "model")
        else:
            model.model.save_pretrained(folder / "model")
            add(TRANSFORMERS_EAGER, Kind.TRANSFORMERS, folder / "model")
    runs = get_backend(backend)
    # What int8 is set against is the fastest float program that there is.
    in_float = INDUCTOR if runs is NATIVE else runs
    with step("compiling in fp32"):
        api.compile_float(model, in_float.name).save(folder / f"fp32{in_float.suffix}")
    add(FP32, Kind.PROGRAM, folder / f"fp32{in_float.suffix}")
    for index, (name, recipe) in enumerate(zip(int8_names(recipes), recipes, strict=True)):
        with step(f"quantizing ({recipe.name})"):
            quantized = api.quantize(model, calibration_of(model), recipe, backend=backend)
        with step(f"lowering {name}"):
            quantized.lower().save(folder / f"int8-{index}{runs.suffix}")
        del quantized  # the next one needs the memory
        add(name, Kind.PROGRAM, folder / f"int8-{index}{runs.suffix}")
    if Peer.TRANSFORMERS in peers:
        add(TRANSFORMERS_EAGER, Kind.TRANSFORMERS, folder / "model")
    if Peer.LLAMA in peers:
        from mq_ao.bench.peer_llama import quantize

        assert isinstance(model, MambaLM), "the others were refused"
        kinds = ["Q8_0", "Q4_0"] if any(map(_has_four_bits, recipes)) else ["Q8_0"]
        with step("writing GGUF files"):
            write_f32(model, folder / "F32.gguf")
            for kind in kinds:
                quantize(folder / "F32.gguf", folder / f"{kind}.gguf", kind, threads)
        for kind in ("F32", *kinds):
            add(f"llama.cpp {kind}", Kind.LLAMA, folder / f"{kind}.gguf")
    return specs


def _has_four_bits(recipe: Recipe) -> bool:
    """Whether some of the weights have 4 bits, or are held in them."""
    return any(spec.bits < 8 for scheme in recipe.schemes for spec in scheme.roles.values())
