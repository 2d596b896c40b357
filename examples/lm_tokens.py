"""The tokens of train_lm.py's text: a byte-pair tokenizer, and the text's token ids, both kept beside the text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training import say

from mq_ao.files import replacing

END = "<|endoftext|>"
"""Token 0: before, between and after documents."""
SAMPLE_BYTES = 30_000_000
"""How much of the training text the tokenizer learns from."""
_CHUNK = 256


def read_split(corpus: Path, split: str) -> list[bytes]:
    """The documents of "train", "heldout" or "calibration"."""
    return (corpus / f"{split}.txt").read_bytes().split(b"\0")


def tokenizer_of(corpus: Path, vocab_size: int) -> Tokenizer:
    """The corpus' tokenizer of that size, learned from a sample of its training documents if there is none yet."""
    path = corpus / f"tokenizer-{vocab_size}.json"
    if not path.exists():
        say(f"training a tokenizer of {vocab_size} tokens")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_sample(read_split(corpus, "train")), trainer)
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return Tokenizer.from_file(str(path))


def _sample(documents: list[bytes]) -> Iterator[str]:
    """Documents in a random order that is always the same, up to `SAMPLE_BYTES`."""
    size = 0
    for document in random.Random(0).sample(documents, len(documents)):
        size += len(document)
        if size > SAMPLE_BYTES:
            return
        yield document.decode()


def token_ids(corpus: Path, tokenizer: Tokenizer) -> Tensor:
    """The training text as one vector of token ids, int16, documents between `END`; encoded once and then read."""
    path = corpus / f"train-{tokenizer.get_vocab_size()}.npy"
    if not path.exists():
        say("encoding the training text")
        documents = read_split(corpus, "train")
        parts = [numpy.zeros(1, dtype=numpy.int16)]
        for start in range(0, len(documents), _CHUNK):
            rows: list[int] = []
            for encoded in tokenizer.encode_batch([text.decode() for text in documents[start : start + _CHUNK]]):
                rows += [*encoded.ids, 0]
            parts.append(numpy.array(rows, dtype=numpy.int16))
        with replacing(path) as temporary, temporary.open("wb") as file:
            numpy.save(file, numpy.concatenate(parts))
    return torch.from_numpy(numpy.load(path))
