"""Programs under the LLM runner of ExecuTorch's wheel: what Python generates, and no memory of the last text."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mq_ao
from mq_ao.lowering.executorch import ExecutorchProgram, Options
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.models import MambaConfig, MambaLM
from tests.captured import randomise
from tests.conftest import CommandLine, error
from tests.test_capture_transformers import MODELS
from tests.test_executorch import FLIPPED_STEPS, relative

transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')
tokenizers = pytest.importorskip("tokenizers", reason='needs pip install "mq-ao[hf]"')
llm = pytest.importorskip("executorch.extension.llm.runner", reason='needs pip install "mq-ao[executorch]"')

from executorch.runtime import Runtime  # noqa: E402

LAST, END = 256, "<|end|>"
PIECE, CONTEXT = 16, 64
NEW = 10
Made = tuple[ExecutorchProgram, StatefulGraph, Path]
PROMPTS = ("a", "hello there, how are you?", "import os")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """ASCII and pairs of letters, none of which is part of a character: the runner hands on each token by itself."""
    letters = string.ascii_letters + string.digits + string.punctuation + "Ġ"
    pairs = [(first, second) for first in "abcdefghijk" for second in string.ascii_lowercase]
    pieces = [*letters, *map("".join, pairs)][:LAST]
    vocabulary = {**{piece: index for index, piece in enumerate(pieces)}, END: LAST}
    merges = pairs[: LAST - len(letters)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "MambaLM":
        return MambaLM(MambaConfig(vocab_size=LAST + 1, d_model=32, n_layer=1)).eval()
    config = transformers.BambaConfig(**{**MODELS[name][0], "num_hidden_layers": 2, "vocab_size": LAST + 1})
    return randomise(transformers.BambaForCausalLM(config))


@pytest.fixture(scope="module", params=["MambaLM", "Bamba"])
def made(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A program, its simulation, and the folder of its file and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    batches = [torch.randint(0, LAST, (4, 32), generator=torch.Generator().manual_seed(1))]
    quantized = mq_ao.quantize(model_of(request.param), batches, backend="executorch", tokenizer=tokenizer)
    program = quantized.lower(options=Options(max_length=PIECE, max_context=CONTEXT, runner=True))
    assert isinstance(program, ExecutorchProgram)
    program.save(folder / "model.pte")
    tokenizer.save_pretrained(folder)
    return program, StatefulGraph(quantized.converted), folder


def written(runner: Any, prompt: str) -> str:
    pieces: list[str] = []
    config = llm.GenerationConfig(temperature=0.0, max_new_tokens=NEW, echo=False)
    runner.generate(prompt, config, pieces.append)
    return "".join(pieces)


def test_the_runner_writes_what_python_generates(made: Made, tokenizer: Any) -> None:
    program, _, folder = made
    runner = llm.TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    texts: dict[str, str] = {}
    # Each prompt twice, with others before: a state that was left over would show.
    for prompt in (*PROMPTS, *reversed(PROMPTS)):
        ids = torch.tensor([tokenizer.encode(prompt)])
        wanted = tokenizer.decode(program.generate(ids, NEW)[0, ids.shape[1] :])
        got = written(runner, prompt)
        assert got == wanted
        assert texts.setdefault(prompt, got) == got
        runner.reset()
    assert len(set(texts.values())) > 1, "texts depend on their prompts"


def test_python_has_the_same_interface(made: Made) -> None:
    program, simulation, _ = made
    ids = torch.arange(20)[None]
    expected = simulation(ids)[0]
    for _ in range(2):
        every, *states = program(ids[:, :9])
        step, *states = program.decode(ids[:, 9:10], *states)
        last, *_ = program.prefill(ids[:, 10:], *states)
        got = torch.cat([every, step, last], dim=1)
        assert relative(got, torch.cat([expected[:, :10], expected[:, -1:]], dim=1)) < FLIPPED_STEPS


def test_constants_are_those_that_the_runner_asks_for(made: Made) -> None:
    program, _, folder = made
    loaded = Runtime.get().load_program(folder / "model.pte")
    limit = CONTEXT if "max_context" in program.info else 2**31 - 1
    wanted = {"get_max_seq_len": PIECE, "get_max_context_len": limit, "get_vocab_size": LAST + 1}
    wanted |= {"enable_dynamic_shape": True, "use_kv_cache": True, "get_eos_ids": LAST}
    for name, value in wanted.items():
        assert loaded.load_method(name).execute([]) == [value], name


def test_profile_is_of_programs_with_our_methods(made: Made, mq_ao: CommandLine) -> None:
    assert "was made for ExecuTorch's runner (--runner)" in error(mq_ao("inspect", made[2] / "model.pte", "--profile"))
    assert mq_ao("inspect", made[2] / "model.pte").code == 0
