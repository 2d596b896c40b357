"""Every block of code in the documentation runs as it stands, or says in a comment before it why it does not.

    <!-- not run: needs a GPU -->

The blocks of a page run in order, Python in one namespace, in a folder with the files that pages speak of. What a page
takes for granted, such as a model, is in `GIVEN`. Commands run in this process, and calibrate on 2,048 tokens.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mq_ao as package
from mq_ao import text
from mq_ao.models import MambaLM, demo
from mq_ao.recipe_files import read_recipe
from tests.conftest import CommandLine, tokens
from tests.test_packaging import ROOT, tracked

transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')

MADE = ("docs/cli.md", "docs/recipe_tables.md")
"""Pages of the code's own text."""
PAGES = sorted(
    name for name in tracked("README.md", "CONTRIBUTING.md", "docs") if name.endswith(".md") and name not in MADE
)
KINDS = ("python", "sh", "yaml", "text")
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALIBRATED = 2048
"""Tokens that commands calibrate on, instead of 16,384: figures differ, and nothing else."""
NEEDS = {"docs/vllm.md": "compressed_tensors"}
"""Packages without which a page is left out."""
LETTERS = 258
"""Tokens of `letters`: bytes, padding and the end."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: its first line in the page.
        kind: its language.
        code: what is in it.
        reason: why it is not run; None: it is.
    """

    line: int
    kind: str
    code: str
    reason: str | None

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of every command of a block for the shell."""
        for line in self.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks(page: str) -> list[Block]:
    content = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(content.count("\n", 0, match.start(3)), match[2], match[3], match[1]) for match in BLOCK.finditer(content)
    ]


def letters() -> Any:
    """A tokenizer of single bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    table = {piece: index for index, piece in enumerate([*alphabet, "<pad>", "<end>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=table, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<end>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models of transformers with a tokenizer, as checkpoint folders."""
    place = tmp_path_factory.mktemp("folders")
    shape = {"vocab_size": LETTERS, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 256, "eos_token_id": 257}
    attention = {
        "intermediate_size": 128,
        "attn_layer_indices": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    heads = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
    torch.manual_seed(0)
    for name, config in (
        ("my-mamba", transformers.MambaConfig(**shape)),
        ("my-bamba", transformers.BambaConfig(**shape, **attention, **heads)),
    ):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place / name)
        letters().save_pretrained(place / name)
    return place


@pytest.fixture
def workplace(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native_kernels: None) -> Path:
    """The folder that blocks run in."""
    for name in ("my-mamba", "my-bamba"):
        (tmp_path / name).symlink_to(folders / name)
    bundled = tmp_path / "mq_ao/models/demo"
    bundled.mkdir(parents=True)
    (bundled / demo.CALIBRATION.name).symlink_to(demo.CALIBRATION)
    (bundled / demo.HELDOUT.name).write_bytes(demo.HELDOUT.read_bytes()[:8192])
    for name in ("mine.txt", "wiki.txt"):
        (tmp_path / name).write_bytes(demo.CALIBRATION.read_bytes()[:32768])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    whole = text.calibration_batches

    def less(given: text.TokenText, count: int, *sizes: int) -> list[Tensor]:
        return whole(given, min(count, CALIBRATED), *sizes)

    monkeypatch.setattr(text, "calibration_batches", less)
    return tmp_path


def small(tiny: MambaLM) -> dict[str, Any]:
    """A language model, calibration data and a prompt."""
    batches = [tokens(2, 32, seed=seed) for seed in (1, 2)]
    return {"model": tiny, "batches": batches, "ids": batches[0], "prompt": batches[0][:1, :8]}


def quantized(tiny: MambaLM) -> dict[str, Any]:
    """A quantized language model too."""
    found = small(tiny)
    return {**found, "q": package.quantize(tiny, found["batches"])}


def checkpoint(tiny: MambaLM) -> dict[str, Any]:
    """A folder of transformers."""
    return {**small(tiny), "folder": "my-bamba"}


def plain_scan(tiny: MambaLM) -> dict[str, Any]:
    """The example with a scan of its own, and a folder."""
    import plain_scan

    batches = [(plain_scan.sequences(2, 32, seed)[0],) for seed in (1, 2)]
    return {"model": plain_scan.Recall().eval(), "batches": batches, "folder": "my-mamba"}


def graph(tiny: MambaLM) -> dict[str, Any]:
    """A module and the inputs of its graph."""
    calls = [(ids, *tiny.initial_states(len(ids))) for ids in small(tiny)["batches"]]
    return {
        **dict.fromkeys(("model", "my_module"), tiny),
        **dict.fromkeys(("example", "example_inputs"), calls[0]),
        **dict.fromkeys(("batches", "calibration"), calls),
    }


GIVEN: Mapping[str, Callable[[MambaLM], dict[str, Any]]] = {
    "docs/cuda.md": small,
    "docs/hybrids.md": checkpoint,
    "docs/native.md": quantized,
    "docs/own_model.md": plain_scan,
    "docs/passes.md": graph,
    "docs/pt2e.md": graph,
    "docs/qat.md": small,
    "docs/transformers.md": checkpoint,
}
"""What pages take for granted besides `mq_ao` and `torch`."""


def test_blocks_have_a_kind_and_reasons_name_tests_that_exist() -> None:
    known = tracked()
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), f"{page} has a block that is not found"
        for block in blocks(page):
            assert block.kind in KINDS, f"{page}:{block.line}"
            if block.reason is not None:
                assert block.kind in ("python", "sh"), f"{page}:{block.line}"
                assert set(re.findall(r"tests/\w+\.py", block.reason)) <= known, f"{page}:{block.line}"


def test_python_that_is_not_run_is_python() -> None:
    # Commands and their options, of blocks that are not run too, are checked in tests/test_cli.py.
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "python":
                compile(block.code, f"{page}:{block.line}", "exec", dont_inherit=True)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.reason is None for block in blocks(page))])
def test_the_blocks_of_a_page_run(page: str, workplace: Path, tiny: MambaLM, mq_ao: CommandLine) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    namespace = {"__name__": "__main__", "mq_ao": package, "torch": torch}
    if page in GIVEN:
        namespace.update(GIVEN[page](tiny))
    for block in blocks(page):
        if block.reason is not None:
            continue
        where = f"{page}:{block.line}"
        if block.kind == "python":
            exec(compile(block.code, where, "exec", dont_inherit=True), namespace)
        elif block.kind == "yaml":
            (workplace / "block.yaml").write_text(block.code, encoding="utf-8")
            read_recipe(workplace / "block.yaml")
        elif block.kind == "sh":
            for command, *arguments in block.commands:
                assert command == "mq-ao", f"{where}: {command} cannot be run here: say why"
                run = mq_ao(*arguments)
                assert run.code == 0, f"{where}: {run.err}"
