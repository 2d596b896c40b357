"""Folders of the compressed-tensors format, loaded by transformers and the real compressed-tensors package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors", reason='needs compressed-tensors: pip install "mq-ao[compressed]"')

import transformers

import mq_ao as package
from mq_ao import MqAoError
from mq_ao.integrations.compressed_tensors import RECIPES, Scheme, save_pretrained
from mq_ao.models import Mamba2Config, language_model
from tests import test_tokenizer
from tests.conftest import CommandLine, error
from tests.test_capture_transformers import VOCAB, build
from tests.test_tokenizer import WORDS

words = test_tokenizer.words  # a fixture

FAMILIES = ["Mamba", "FalconMamba", "Mamba2", "Bamba", "FalconH1", "NemotronH", "GraniteMoeHybrid", "Jamba"]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [tokens(2, 64, seed=seed) for seed in (11, 12)]


def wide(name: str) -> Any:
    """A model whose linears have multiples of 64 inputs."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 32}
    attention = {"intermediate_size": 128, "attn_layer_indices": [1], "mamba_d_state": 16, "mamba_n_groups": 1, **heads}
    extra = {"Mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1}, "Bamba": attention}[name]
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape, **extra)).eval()


CASES = [*((name, Scheme.W8A8) for name in FAMILIES), ("Mamba2", Scheme.W4A16), ("Bamba", Scheme.W4A16)]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_transformers_computes_what_the_simulation_computes(name: str, scheme: Scheme, tmp_path: Path) -> None:
    model: Any = build(name).eval() if scheme is Scheme.W8A8 else wide(name)
    in_float = save_pretrained(model, tmp_path, BATCHES, scheme)
    # transformers asks some weights for their dtype, which packed ones do not have: they are unpacked where they load.
    settings = transformers.CompressedTensorsConfig(run_compressed=scheme is Scheme.W8A8)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    simulation = _simulation(model, scheme)

    def errors(ids: torch.Tensor) -> torch.Tensor:
        """Of each token's logits, relative."""
        with torch.no_grad():
            expected = simulation(ids, *_states(model, ids))
            expected = expected[0] if isinstance(expected, list | tuple) else expected
            return (loaded(ids, use_cache=False).logits - expected).norm(dim=-1) / expected.norm(dim=-1)

    # The same integers. Sums in another order put a value on the border between two integers on its other side, which
    # then moves all that follows: of single tokens, many have no such value.
    assert (errors(tokens(40, 1)) < 1e-4).float().mean() > 0.25
    assert errors(tokens(2, 12, seed=1)).mean() < 0.05
    stored = load_file(tmp_path / "model.safetensors")
    integers = [key for key, value in stored.items() if value.dtype in (torch.int8, torch.int32)]
    linears = [key for key, item in model.named_modules() if isinstance(item, torch.nn.Linear)]
    assert len(integers) == len(linears) - len(in_float) and "lm_head" in in_float
    assert {name.rsplit(".")[-1] for name in in_float} <= {"lm_head", "dt_proj"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == in_float


def _simulation(model: Any, scheme: Scheme) -> torch.fx.GraphModule:
    """Ours, with the package's grid for tokens: it divides the largest by 127.5 where vLLM and we divide by 127."""
    graph = package.quantize(model, BATCHES, RECIPES[scheme]).converted
    for node in graph.graph.nodes:
        if str(node.target).startswith("torchao."):
            node.args = tuple(-128 if type(value) in (int, float) and value == -127 else value for value in node.args)
    graph.recompile()
    return graph


def _states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return package.api.generating(model).states.examples(len(ids), 0)


def test_what_cannot_be_such_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="mixture of experts has its weights in one tensor"):
        save_pretrained(build("GraniteMoeHybrid, experts").eval(), tmp_path, BATCHES)
    with pytest.raises(MqAoError, match="Zamba2ForCausalLM computes something else"):
        save_pretrained(build("Zamba2").eval(), tmp_path, BATCHES)
    with pytest.raises(MqAoError, match="no causal language model of transformers"):
        save_pretrained(language_model(Mamba2Config(VOCAB, 32, 1, headdim=16)).eval(), tmp_path, BATCHES)
    with pytest.raises(MqAoError, match="unknown scheme 'w2a2': the schemes are w8a8, w4a16"):
        save_pretrained(build("Mamba2").eval(), tmp_path, BATCHES, "w2a2")
    with pytest.raises(MqAoError, match="a linear has 32 inputs, and w4a16 takes multiples of 64: use w8a8"):
        save_pretrained(build("Bamba").eval(), tmp_path, BATCHES, "w4a16")
    assert not list(tmp_path.iterdir())


def test_from_the_shell(mq_ao: CommandLine, words: Any, tmp_path: Path) -> None:
    build("Mamba2").save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 4))
    given = ("--calibration", tmp_path / "text.txt", "--tokens", "128", "--format", "compressed-tensors")
    run = mq_ao("quantize", tmp_path / "model", *given, "-o", tmp_path / "out")
    assert run.code == 0, run.err
    assert "compressed-tensors-w8a8" in run.out and "In float: lm_head" in run.out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=3).shape[1] == 5
    assert "is not empty: name a new one" in error(
        mq_ao("quantize", tmp_path / "model", *given, "-o", tmp_path / "out")
    )
    unknown = ("--recipe", "quarot-w4a8", "-o", tmp_path / "other")
    assert "the schemes are w8a8, w4a16" in error(mq_ao("quantize", tmp_path / "model", *given, *unknown))
