"""Folders as libraries write them: default configurations, base models, wrapped names, half precision, large models."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mq_ao import memory
from mq_ao.errors import MqAoError
from mq_ao.models import Mamba2Config, MambaConfig, MambaLM, checkpoint, loading
from mq_ao.models.layouts import read_config
from mq_ao.models.loading import load
from mq_ao.models.vim import Vim
from mq_ao.models.vision_config import VimConfig
from tests.captured import randomise
from tests.test_capture_mamba_ssm import by_references, package

# Both sides compute in float32, in another order, and logits of these weights are near 10.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
# transformers checks that the heads fill the width; everything else is its default.
LIBRARY = {"Mamba": SIZES, "Mamba2": {**SIZES, "hidden_size": 256, "num_heads": 8}}
IDS = torch.randint(40, (2, 21), generator=torch.Generator().manual_seed(0))
CONFIG = MambaConfig(vocab_size=24, d_model=16, n_layer=2, d_state=4)


def theirs(family: str, kind: str = "ForCausalLM", **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')
    config = getattr(transformers, f"{family}Config")(**LIBRARY[family], **options)
    return randomise(getattr(transformers, family + kind)(config))


def own() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(CONFIG).eval()


def rewrite_config(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def write_as(folder: Path, model: MambaLM, rename: Callable[[str], str], **options: Any) -> None:
    """Our layout with other names."""
    model.save_pretrained(folder)
    rewrite_config(folder, **options)
    weights = {rename(name): value.clone() for name, value in model.named_parameters()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def same_logits(folder: Path, model: MambaLM) -> None:
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(load(folder)(ids)[0], model(ids)[0])


@pytest.mark.parametrize("family", LIBRARY)
def test_default_configurations_of_transformers(tmp_path: Path, family: str) -> None:
    model = theirs(family)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, (logits, _, _) = model(IDS, use_cache=False).logits, load(tmp_path)(IDS)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_the_default_of_mamba_2_has_no_limit(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')
    transformers.Mamba2Config().save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    config = read_config(tmp_path)
    assert isinstance(config, Mamba2Config)
    assert (config.dt_min, config.dt_max, config.d_model, config.n_layer) == (0.0, None, 4096, 64)


@pytest.mark.parametrize("layer", ["", "Mamba1", "Mamba2"])
def test_default_configurations_of_mamba_ssm(tmp_path: Path, layer: str) -> None:
    try:
        with package():
            from mamba_ssm.models.config_mamba import MambaConfig as Options
            from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

            torch.manual_seed(0)
            options = Options(d_model=64, n_layer=2, vocab_size=37, ssm_cfg={"layer": layer} if layer else {})
            model = MambaLMHeadModel(options)
            randomise(model).save_pretrained(tmp_path)
            expected = by_references()(model, IDS % 37)
    except MqAoError as error:
        pytest.skip(str(error))
    loaded = load(tmp_path)
    assert (loaded.config.vocab_size, loaded.config.known_tokens) == (40, 37)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS % 37)[0], expected, **CLOSE)


TAGGED = {"__float__": "Infinity"}


@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([0.0, TAGGED], (0.0, None)),
        ([0.0, math.inf], (0.0, None)),  # json writes and reads a bare Infinity
        (math.inf, (0.0, None)),
        (TAGGED, (0.0, None)),
        (None, (0.0, None)),
        ([0.0, None], (0.0, None)),
        ([None, 0.5], (0.0, 0.5)),
        ("Infinity", (0.0, None)),
        (["0.0", "inf"], (0.0, None)),
        ([0, "Infinity"], (0.0, None)),
        (["1e-3", 0.5], (0.001, 0.5)),
        ([0.25, TAGGED], (0.25, None)),
    ],
)
def test_limits_as_they_are_written(
    tmp_path: Path, layout: str, written: Any, expected: tuple[float, float | None]
) -> None:
    values: dict[str, Any]
    if layout == "transformers":
        values = {"model_type": "mamba2", **SIZES, "head_dim": 8, "time_step_limit": written}
    else:
        values = {"vocab_size": 40, "d_model": 32, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2", "dt_limit": written}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert isinstance(config, Mamba2Config)
    assert (config.dt_min, config.dt_max) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"time_step_limit": [0.0]},
        {"time_step_limit": 0.5},
        {"time_step_limit": [0.0, {"__float__": "NaN"}]},
        {"time_step_limit": [0.0, {"other": 1}]},
        {"time_step_limit": [0.0, "much"]},
        {"time_step_limit": [0.0, True]},
        {"layer_norm_epsilon": "small"},
        {"layer_norm_epsilon": [1e-5]},
    ],
)
def test_limits_that_are_no_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2", **SIZES, **options}))
    with pytest.raises(MqAoError, match=rf"config\.json: {next(iter(options))} is .*: give a"):
        read_config(tmp_path)


@pytest.mark.parametrize("limit", [[TAGGED, TAGGED], [-1, 2]])
def test_limits_that_no_step_size_has(tmp_path: Path, limit: list[Any]) -> None:
    values = {"model_type": "mamba2", **SIZES, "head_dim": 8, "time_step_limit": limit}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(MqAoError, match="dt_min is"):
        read_config(tmp_path)


@pytest.mark.parametrize("epsilon", ["1e-4", 1e-4])
def test_other_numbers_may_be_strings_and_null_is_the_default(tmp_path: Path, epsilon: object) -> None:
    values = {"model_type": "mamba", **SIZES, "layer_norm_epsilon": epsilon, "intermediate_size": None}
    (tmp_path / "config.json").write_text(json.dumps({**values, "time_step_rank": None}))
    assert read_config(tmp_path) == MambaConfig(vocab_size=40, d_model=32, n_layer=2, norm_epsilon=1e-4)


@pytest.mark.parametrize("family", LIBRARY)
def test_base_models_of_transformers(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "mq-ao[hf]"')
    theirs(family, "Model", tie_word_embeddings=True).save_pretrained(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "embeddings.weight" in names and "layers.0.mixer.D" in names
    whole = getattr(transformers, f"{family}ForCausalLM").from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(IDS)[0], whole(IDS, use_cache=False).logits, **CLOSE)


def test_a_base_model_whose_head_is_missing(tmp_path: Path) -> None:
    theirs("Mamba2", "Model").save_pretrained(tmp_path)
    with pytest.raises(MqAoError, match="base model, without a head.*: save the language model with its lm_head"):
        load(tmp_path)


PREFIXED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled blocks": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "a trainer's": lambda name: f"model.{name}",
    "a trainer's, compiled": lambda name: f"model._orig_mod.{name}",
    "base": lambda name: name.removeprefix("backbone."),
    "base, compiled": lambda name: "_orig_mod." + name.removeprefix("backbone."),
    "base, named model": lambda name: name.replace("backbone.", "model."),
    "embeddings": lambda name: name.replace("embedding.", "embeddings."),
}


@pytest.mark.parametrize("name", PREFIXED)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_names_with_something_before_them(tmp_path: Path, name: str, tie: bool) -> None:
    torch.manual_seed(0)
    model = MambaLM(dataclasses.replace(CONFIG, tie_embeddings=tie)).eval()
    write_as(tmp_path, model, PREFIXED[name])
    same_logits(tmp_path, model)


def test_state_dicts_of_wrapped_models(tmp_path: Path) -> None:
    model = own()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(wrapped.state_dict(), tmp_path / "pytorch_model.bin")
        same_logits(tmp_path, model)


def test_another_prefix_is_named(tmp_path: Path) -> None:
    write_as(tmp_path, own(), lambda name: f"policy.net.{name}")
    with pytest.raises(MqAoError, match=r'begin with "policy\.net\.backbone\." where "backbone\." is expected: take'):
        load(tmp_path)


def test_two_weights_of_one_name(tmp_path: Path) -> None:
    model = own()
    write_as(tmp_path, model, str)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for twin in ("backbone.embeddings.weight", "module.backbone.embedding.weight"):
        twins = {twin: torch.zeros(24, 16), **weights}
        safetensors.torch.save_file(twins, tmp_path / "model.safetensors")
        with pytest.raises(MqAoError, match=rf"{twin}.* are both backbone\.embedding\.weight"):
            load(tmp_path)


def test_vision_checkpoints_of_wrapped_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VimConfig(image_size=8, patch_size=4, num_classes=3, d_model=16, n_layer=1, d_state=4)
    model = Vim(config).eval()
    torch.save({"model": nn.DataParallel(model).state_dict()}, tmp_path / "vim.pth")
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(Vim.from_pretrained(tmp_path / "vim.pth", image_size=8)(images), model(images))


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "old pickle"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_float32(
    tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own()
    model.save_pretrained(tmp_path)
    stored = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
    if kind == "safetensors":
        safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    else:
        (tmp_path / "model.safetensors").unlink()
        new = kind == "pickle"
        torch.save(stored, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    convert, alive = checkpoint._float32, list[Any]()

    def watched(weight: Tensor, **options: Any) -> Tensor:
        # What is stored is never in memory as a whole beside what it becomes.
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(weight))
        return convert(weight, **options)

    monkeypatch.setattr(checkpoint, "_float32", watched)
    loaded = load(tmp_path)
    assert len(alive) == len(stored)
    for name, value in loaded.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float()), name


def test_a_pickle_may_be_written_anew_while_its_model_is_in_use(tmp_path: Path) -> None:
    model = own()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path)
    torch.save({name: value * 0 for name, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_model_larger_than_memory_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 3_000_000_000)
    monkeypatch.setattr(loading, "read_weights", lambda folder: pytest.fail("the weights were read"))
    values = {"model_type": "mamba2", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(MqAoError, match=r"needs 29\.\d GB for its weights in float32, and 3\.0 GB of memory are av"):
        load(tmp_path)


def test_memory_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, groups = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    500 kB\nSwapFree: 100 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP_ROOT", groups)
    assert memory.available() == 600 * 1024
    (groups / "memory").mkdir(parents=True)
    for name, text in (("memory.max", "max\n"), ("memory.current", "9\n")):  # no limit
        (groups / name).write_text(text)
    assert memory.available() == 600 * 1024
    (groups / "memory.max").write_text("400000\n")
    (groups / "memory.current").write_text("300000\n")
    (groups / "memory.stat").write_text("anon 250000\ninactive_file 50000\n")
    assert memory.available() == 150_000
    for name, text in (("limit_in_bytes", "1000"), ("usage_in_bytes", "900"), ("stat", "total_inactive_file 20")):
        (groups / "memory" / f"memory.{name}").write_text(text)
    assert memory.available() == 120


def test_known_tokens_are_within_the_vocabulary() -> None:
    for wrong in (0, 25, 2.5, True):
        with pytest.raises(MqAoError, match="known_tokens is"):
            dataclasses.replace(CONFIG, known_tokens=wrong)


@pytest.mark.parametrize("path", ["demo", "someone/model"])
def test_a_path_is_a_folder_and_nothing_else(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_download", lambda source: pytest.fail("the hub was asked"))
    with pytest.raises(MqAoError, match="there is no folder"):
        load(Path(path))
    own().save_pretrained(Path(path))
    assert load(Path(path)).config == CONFIG
