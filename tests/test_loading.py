"""Loading: the three layouts, equality with transformers, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models import MambaConfig, MambaLM
from mq_ao.models.loading import load

CONFIG = MambaConfig(vocab_size=24, d_model=16, n_layer=2, d_state=4)
UNTIED = MambaConfig(vocab_size=24, d_model=16, n_layer=2, d_state=4, tie_embeddings=False, bias=True)


def build(config: MambaConfig = CONFIG) -> MambaLM:
    torch.manual_seed(0)
    model = MambaLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # every weight distinct, so that none can be mistaken for another
            parameter.add_(torch.rand_like(parameter) * 0.1)
    return model


def same(model: MambaLM, other: MambaLM, known_tokens: int | None = None) -> None:
    assert model.config == dataclasses.replace(other.config, known_tokens=known_tokens)
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def write_mamba_ssm(folder: Path, model: MambaLM, **options: Any) -> None:
    """The layout of the state-spaces checkpoints: mamba_ssm's own options, a pickled state_dict."""
    config = model.config
    values = {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size - 3,
        "ssm_cfg": {"d_state": config.d_state},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | options))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_transformers(folder: Path, model: MambaLM, **options: Any) -> dict[str, Tensor]:
    """The layout of transformers, written by hand; returns the weights under its names."""
    config = model.config
    values = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": config.d_state,
        "intermediate_size": config.d_inner,
        "time_step_rank": config.dt_rank,
        "use_bias": config.bias,
        "tie_word_embeddings": config.tie_embeddings,
    }
    weights = {name.replace("embedding.", "embeddings."): value for name, value in model.state_dict().items()}
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | options))
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_own_layout_comes_back(tmp_path: Path, config: MambaConfig) -> None:
    model = build(config)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = MambaLM.from_pretrained(tmp_path / "new" / "folder")
    same(loaded, model)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == config.tie_embeddings
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_equals_transformers(tmp_path: Path, tie: bool, shards: bool) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        conv_kernel=3,
        time_step_rank=5,
        use_bias=True,
        layer_norm_epsilon=1e-4,
        tie_word_embeddings=tie,
        initializer_range=0.5,
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    ours = load(tmp_path)
    ids = torch.randint(40, (2, 21))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        logits, _, _ = ours(ids)
    # Logits of these weights are near 10; both compute in float32, in another order.
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_mamba_ssm_layout(tmp_path: Path) -> None:
    model = build()
    write_mamba_ssm(tmp_path, model)
    loaded = load(tmp_path)
    same(loaded, model, known_tokens=21)  # padded to a multiple of 8
    loaded.save_pretrained(tmp_path / "own")
    same(load(tmp_path / "own"), loaded, known_tokens=21)
    write_mamba_ssm(tmp_path, model, vocab_size=24)
    same(load(tmp_path), model)  # a multiple already: no padding


def test_mamba_ssm_layout_in_half_precision_and_with_every_option(tmp_path: Path) -> None:
    model = build(
        MambaConfig(vocab_size=24, d_model=16, n_layer=2, d_state=4, d_conv=3, expand=3, dt_rank=7, conv_bias=False)
    )
    ssm_cfg = {"layer": "Mamba1", "d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 7, "conv_bias": False}
    write_mamba_ssm(tmp_path, model, ssm_cfg=ssm_cfg | {"dt_min": 0.01, "use_fast_path": False}, attn_layer_idx=[])
    torch.save({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path)
    assert loaded.config.d_conv == 3 and loaded.config.expand == 3 and loaded.config.rank == 7
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def test_shards_of_pickles(tmp_path: Path) -> None:
    model = build()
    write_transformers(tmp_path, model)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"pytorch_model-{1 + index % 2:05d}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    same(load(tmp_path), model)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(MqAoError, match="00002-of-00002"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(MqAoError, match="beside it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rms_norm": False}, "LayerNorm"),
        ({"attn_layer_idx": [1]}, "attention"),
        ({"d_intermediate": 64}, "MLP"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"ssm_cfg": {"headdim": 64}}, "headdim"),
        ({"ssm_cfg": [1]}, "ssm_cfg"),
        ({"rotary": True}, "rotary"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"d_model": -4}, "d_model"),
    ],
)
def test_mamba_ssm_options_that_change_the_mathematics_are_refused(
    tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    write_mamba_ssm(tmp_path, build(), **options)
    with pytest.raises(MqAoError, match=word):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model_type": "mamba3"}, "mamba3"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "falcon_mamba"}, "falcon_mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"intermediate_size": 48}, "intermediate_size"),
        ({"num_hidden_layers": "2"}, "n_layer"),
    ],
)
def test_other_families_are_refused(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    write_transformers(tmp_path, build(), **options)
    with pytest.raises(MqAoError, match=word):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[1]", "object"),
        (b"{}", "model_type"),
        (b'{"model_type": "mamba"}', "hidden_size"),
        (b'{"model_type": "mq_ao.mamba", "vocab_size": 8}', "d_model"),
        (
            b'{"model_type": "mq_ao.mamba", "vocab_size": 8, "d_model": 8, "n_layer": 1, "x": 0}',
            "unknown keys x",
        ),
    ],
)
def test_broken_configurations_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MqAoError, match=word):
        load(tmp_path)


LAST = "backbone.layers.1.mixer.out_proj.weight"


def _without(weights: dict[str, Tensor]) -> None:
    del weights[LAST]


def _more(weights: dict[str, Tensor]) -> None:
    weights["backbone.layers.2.norm.weight"] = torch.ones(16)


def _wider(weights: dict[str, Tensor]) -> None:
    weights[LAST] = torch.zeros(16, 33)


def _nan(weights: dict[str, Tensor]) -> None:
    weights[LAST][3, 3] = torch.nan


def _inf(weights: dict[str, Tensor]) -> None:
    weights[LAST][0, 0] = -torch.inf


def _integers(weights: dict[str, Tensor]) -> None:
    weights[LAST] = torch.zeros(16, 32, dtype=torch.int8)


def _other_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = torch.zeros(24, 16)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_without, f"missing: {LAST}"),
        (_more, "does not have: backbone.layers.2.norm.weight"),
        (_wider, rf"{LAST} is \(16, 33\) and should be \(16, 32\)"),
        (_nan, f"NaN or infinity: {LAST}"),
        (_inf, f"NaN or infinity: {LAST}"),
        (_integers, f"floating-point.*{LAST}"),
        (_other_head, "ties the head"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], word: str) -> None:
    weights = write_transformers(tmp_path, build())
    weights = {name: value.clone() for name, value in weights.items()}
    spoil(weights)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(MqAoError, match=word):
        load(tmp_path)


def test_many_missing_weights_are_counted(tmp_path: Path) -> None:
    write_transformers(tmp_path, build())
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MqAoError, match=r"missing: .*A_log.* and \d+ more"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 500, -1], ids=["empty", "5 bytes", "500 bytes", "all but one"])
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_truncated_weights_are_refused(tmp_path: Path, kind: str, keep: int) -> None:
    if kind == "safetensors":
        build().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        write_mamba_ssm(tmp_path, build())
        path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MqAoError, match=r"cut off or broken|is broken or holds"):
        load(tmp_path)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickled-code-ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_mamba_ssm(tmp_path, build())
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"backbone.embedding.weight": _Code()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(MqAoError, match="never executed"):
            load(tmp_path)
    assert not (tmp_path / "pickled-code-ran").exists()


def test_pickles_of_something_else_are_refused(tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path, build())
    for value in ([torch.ones(2)], {"a": 1}, {1: torch.ones(2)}):
        torch.save(value, tmp_path / "pytorch_model.bin")
        with pytest.raises(MqAoError, match="table of tensors"):
            load(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match=r"no config\.json"):
        load(tmp_path)
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MqAoError, match=r"no weights: one of model\.safetensors"):
        load(tmp_path)
    with pytest.raises(MqAoError, match="is a file"):
        load(tmp_path / "config.json")


@pytest.mark.parametrize("source", ["/no/such/folder", "./gone", "a/b/c", "", "C:\\models\\x"])
def test_paths_that_are_not_there_never_reach_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would say "need huggingface_hub"
    with pytest.raises(MqAoError, match=r"check the path|config\.json") as error:
        load(source)
    assert "huggingface_hub" not in str(error.value)


def test_hub_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MqAoError, match="need huggingface_hub"):
        load("state-spaces/mamba-130m-hf")


def _hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]  # a module made up on the spot
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str, **options: Any) -> str:
        raise ConnectionError("no route\nmore")

    _hub(monkeypatch, download)
    with pytest.raises(MqAoError, match=r"no folder demoo, and the hub.*ConnectionError: no route\).*spelling"):
        load("demoo")


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_hub_prefers_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, asked = build(), []

    def download(source: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if kind == "safetensors":
            model.save_pretrained(tmp_path)
        elif any("bin" in pattern for pattern in allow_patterns):
            write_mamba_ssm(tmp_path, model)
        return str(tmp_path)

    _hub(monkeypatch, download)
    # mamba_ssm's layout, which comes as pickles here, tells the tokens that are no padding.
    same(load("someone/mamba"), model, known_tokens=None if kind == "safetensors" else 21)
    assert len(asked) == (1 if kind == "safetensors" else 2)


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(MqAoError, match="cannot be written"):
        build().save_pretrained(tmp_path / "taken" / "model")


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    model.save_pretrained(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MqAoError, match="No space left"):
        build(UNTIED).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    same(load(tmp_path), model)
