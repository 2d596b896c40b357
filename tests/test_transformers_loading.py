"""FalconMamba and hybrids from their folders: `mq_ao.models.load` and the commands."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

import mq_ao as package
from mq_ao import memory
from mq_ao.errors import MqAoError
from mq_ao.lowering.language_graphs import states_of
from mq_ao.models import Logits, MambaConfig, MambaLM, load
from mq_ao.models.layouts import TRANSFORMERS_FAMILIES
from tests import test_capture_transformers as source
from tests.conftest import CommandLine, error

OTHERS = [name for name in source.MODELS if not name.startswith("Mamba")]
IDS = source.tokens(3, 11)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FalconMamba's, with the default configuration but for its size; and stored ids."""
    transformers = source.transformers
    path = tmp_path_factory.mktemp("falcon")
    config = transformers.FalconMambaConfig(vocab_size=source.VOCAB, hidden_size=32, num_hidden_layers=2)
    source.randomise(transformers.FalconMambaForCausalLM(config)).save_pretrained(path)
    numpy.save(path / "ids.npy", source.tokens(8, 16).numpy())
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_load_through_transformers(tmp_path: Path, name: str) -> None:
    model = source.build(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        assert torch.equal(Logits(loaded)(IDS), logits(model))
    assert model.config.model_type in TRANSFORMERS_FAMILIES
    with pytest.raises(MqAoError, match=rf'"{model.config.model_type}".*mq_ao\.models\.load loads it through'):
        MambaLM.from_pretrained(tmp_path)


def test_every_family_is_tried() -> None:
    assert {source.build(name).config.model_type for name in OTHERS} == set(TRANSFORMERS_FAMILIES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = source.build("FalconMamba").to(dtype)
    model.save_pretrained(tmp_path)
    assert dtype in {value.dtype for value in safetensors.torch.load_file(tmp_path / "model.safetensors").values()}
    loaded = load(tmp_path)
    for name, value in loaded.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.get_parameter(name).float()), name


def test_the_default_falcon_mamba(folder: Path) -> None:
    loaded = load(str(folder))
    transformers = source.transformers
    assert isinstance(loaded, transformers.FalconMambaForCausalLM)
    assert torch.equal(logits(loaded), logits(transformers.FalconMambaForCausalLM.from_pretrained(folder).eval()))


def test_mamba_language_models_load_as_ours(tmp_path: Path) -> None:
    model = MambaLM(MambaConfig(vocab_size=24, d_model=16, n_layer=1))
    model.save_pretrained(tmp_path)
    assert isinstance(load(tmp_path), MambaLM) and isinstance(load("demo"), MambaLM)
    with pytest.raises(MqAoError, match="there is no folder"):
        load(tmp_path / "none")


def rewritten(folder: Path, tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The configuration with other options, in another folder; returns the weights, to be written there."""
    config = json.loads((folder / "config.json").read_text()) | options
    (tmp_path / "config.json").write_text(json.dumps(config))
    return safetensors.torch.load_file(folder / "model.safetensors")


def write(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})


def test_weights_are_never_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    weights = rewritten(folder, tmp_path)
    name = "backbone.layers.1.mixer.out_proj.weight"
    write({key: value for key, value in weights.items() if key != name}, tmp_path)
    with pytest.raises(MqAoError, match=rf"cannot be loaded: weights are missing: {name}\."):
        load(tmp_path)
    write({**weights, name: torch.zeros(32, 32)}, tmp_path)
    with pytest.raises(MqAoError, match=rf"do not fit.*: {name} is \(32, 32\) and should be \(32, 64\)"):
        load(tmp_path)
    write({**weights, name: weights[name] * torch.nan}, tmp_path)
    with pytest.raises(MqAoError, match=f"NaN or infinity: {name}"):
        load(tmp_path)
    write({}, tmp_path)
    with pytest.raises(MqAoError, match="missing"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(MqAoError, match="transformers cannot load"):
        load(tmp_path)


def test_weights_of_nothing_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write({**rewritten(folder, tmp_path), "extra.weight": torch.ones(2)}, tmp_path)
    with caplog.at_level(logging.WARNING, "mq_ao.models"):
        load(tmp_path)
    assert "FalconMambaForCausalLM does not have are left out: extra.weight" in caplog.text


def test_base_models_load_as_transformers_loads_them(tmp_path: Path) -> None:
    transformers = source.transformers
    for tie in (True, False):
        config = transformers.FalconMambaConfig(
            vocab_size=source.VOCAB, hidden_size=32, num_hidden_layers=2, tie_word_embeddings=tie
        )
        transformers.FalconMambaModel(config).save_pretrained(tmp_path)
        if tie:
            expected = transformers.FalconMambaForCausalLM.from_pretrained(tmp_path).eval()
            assert torch.equal(logits(load(tmp_path)), logits(expected))
        else:
            with pytest.raises(MqAoError, match=r"weights are missing: lm_head\.weight"):
                load(tmp_path)


def test_larger_than_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(MqAoError, match=r"needs 0\.0 GB for its weights in float32, and 0\.0 GB of memory"):
        load(folder)


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MqAoError, match=r'loaded by transformers: run pip install "mq-ao\[hf\]"'):
        load(folder)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", '"llama": "mamba", "mamba2", the mamba_ssm layout, and through transformers falcon_mamba, jamba'),
        ("mq_ao.vim", "no language model: load it with its class"),
        ("mq_ao.mamba_nd", "no language model"),
    ],
)
def test_what_is_no_mamba(folder: Path, tmp_path: Path, family: str, message: str) -> None:
    write(rewritten(folder, tmp_path, model_type=family), tmp_path)
    with pytest.raises(MqAoError, match=message):
        load(tmp_path)


def test_inspect(mq_ao: CommandLine, folder: Path) -> None:
    run = mq_ao("inspect", folder)
    assert run.code == 0, run.err
    for wanted in ("2 Mamba block(s)", "model.backbone.layers.1.mixer", "(FalconMambaForCausalLM)", "dt_proj"):
        assert wanted in run.out


def test_eval_starts_every_window_from_nothing(mq_ao: CommandLine, folder: Path) -> None:
    run = mq_ao("eval", folder, "--text", folder / "ids.npy", "--window", "5", "--json", "-")
    assert run.code == 0, run.err
    model, nats = load(folder), 0.0
    for row in source.tokens(8, 16):
        for start in (0, 5, 10):
            inputs, targets = row[start : start + 5], row[start + 1 : start + 6]
            with torch.no_grad():
                scores = model(inputs[None], use_cache=False).logits[0, : len(targets)]
            nats += float(nn.functional.cross_entropy(scores, targets, reduction="sum"))
    perplexity = json.loads(run.out)["models"][0]["perplexity"]
    assert perplexity == pytest.approx(numpy.exp(nats / 120), rel=1e-5)
    against = mq_ao("eval", folder, "--text", folder / "ids.npy", "--against", folder, "--json", "-")
    assert json.loads(against.out)["comparison"]["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert "the window is 0" in error(mq_ao("eval", folder, "--text", folder / "ids.npy", "--window", "0"))


def test_the_float_folder_generates(mq_ao: CommandLine, folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(folder, tmp := folder.parent / "with words")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"?": 0, **{f"w{i}": i for i in range(1, source.VOCAB)}}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    source.transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp)
    run = mq_ao("generate", tmp, "-p", "w3 w5", "-n", "4")
    assert run.code == 0, run.err
    with torch.no_grad():
        wanted = load(folder).generate(torch.tensor([[3, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert run.out.split() == [f"w{token}" for token in wanted[0].tolist()]


def test_quantize(mq_ao: CommandLine, folder: Path, tmp_path: Path) -> None:
    page, output = tmp_path / "page.html", tmp_path / "falcon.pt2"
    given = ("--calibration", folder / "ids.npy", "--tokens", "128", "--recipe", "rtn-w8a8")
    run = mq_ao("quantize", folder, *given, "--report", page, "-o", output)
    assert "12 nodes quantized" in run.err and page.is_file()
    assert run.code == 0, run.err
    assert "11 linear_packed" in run.out
    got, expected = package.load(output)(IDS)[0], logits(load(folder))
    assert float((got - expected).norm() / expected.norm()) < 0.2  # int8 on random weights


def test_quantize_from_python(folder: Path) -> None:
    model = load(folder)
    batches = list(source.tokens(8, 16).split(4))
    quantized = package.quantize(Logits(model), batches, "mambaquant-w8a8")
    states = states_of(quantized.converted).examples(len(IDS), 0)
    with torch.no_grad():
        got, expected = quantized.converted(IDS, *states)[0], logits(model)
    assert float((got - expected).norm() / expected.norm()) < 0.2  # int8 on random weights


def test_a_folder_becomes_a_program_that_generates(mq_ao: CommandLine, tmp_path: Path) -> None:
    """A hybrid on bytes: attention and Mamba."""
    config = {**source.HYBRID, **source.SSD, "num_hidden_layers": 2, "attn_layer_indices": [1], "vocab_size": 256}
    torch.manual_seed(0)
    source.transformers.BambaForCausalLM(source.transformers.BambaConfig(**config)).save_pretrained(tmp_path / "bamba")
    (tmp_path / "text.txt").write_text("Some text to calibrate on. " * 40)
    output = tmp_path / "bamba.pt2"
    run = mq_ao("quantize", tmp_path / "bamba", "--calibration", tmp_path / "text.txt", "--tokens", "512", "-o", output)
    assert run.code == 0, run.err
    run = mq_ao("generate", output, "--prompt", "Some", "-n", "8")
    assert run.code == 0, run.err
    assert run.out.startswith("Some") and len(run.out) > 4


class Saved:
    """A program without states, as the lowering of a module that is no `MambaLM` saves it."""

    def __init__(self, run: Callable[[torch.Tensor], Any]) -> None:
        self.run, self.info, self.weight_bytes = run, {"recipe": "rtn-w8a8"}, 0

    def __call__(self, ids: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.run(ids)


def refuses(ids: torch.Tensor) -> Any:
    raise MqAoError("this program takes images")


def test_eval_of_programs_without_states(
    mq_ao: CommandLine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mq_ao import loading

    monkeypatch.setattr(loading, "load", lambda path: Saved(Logits(load(folder))))
    run = mq_ao("eval", tmp_path / "x.pt2", "--text", folder / "ids.npy", "--against", folder, "--json", "-")
    assert run.code == 0, run.err
    content = json.loads(run.out)
    assert content["comparison"]["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert content["models"][1]["tokens"] == 120
    assert "without states, and cannot generate yet" in error(mq_ao("generate", tmp_path / "x.pt2", "-p", "x"))
    for other in (refuses, lambda ids: ids, lambda ids: (ids,)):
        monkeypatch.setattr(loading, "load", lambda path, other=other: Saved(other))
        assert "x.pt2 is a program of no language model" in error(mq_ao("eval", tmp_path / "x.pt2"))
