"""Models quantized, saved, loaded and run by transformers itself, on our kernels."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs transformers: pip install "mq-ao[hf]"')

import transformers

from mq_ao import MqAoError, api
from mq_ao.integrations.transformers import MambaQuantConfig
from mq_ao.integrations.transformers_model import PLAN
from mq_ao.loading import load
from mq_ao.lowering.native import file
from tests import test_tokenizer
from tests.test_capture_transformers import VOCAB, build
from tests.test_tokenizer import WORDS

words = test_tokenizer.words  # a fixture

RECIPE = "mambaquant-w8a8"


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [tokens(2, 64, seed=seed) for seed in (11, 12)]


@pytest.fixture(scope="module", params=["Mamba", "Bamba"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(place)
    return place


def opened(source: Path, **config: Any) -> Any:
    settings = {"quantization_config": MambaQuantConfig(RECIPE, **config)} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(source, **settings)


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Any:
    return opened(folder, calibration=BATCHES)


@pytest.fixture(scope="module")
def saved(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    quantized.save_pretrained(place)
    return place


def ours(folder: Path) -> Any:
    """The same model, quantized without transformers' doors."""
    return api.quantize(opened(folder), BATCHES, RECIPE)


def test_it_runs_what_quantize_gives(folder: Path, quantized: Any) -> None:
    program = ours(folder).lower()
    ids = tokens(3, 12)
    expected = program.generate(ids, 20)
    assert quantized.integers.info["integer_kernels"] == program.integer_kernels
    assert type(quantized).__name__ in ("MambaForCausalLM", "BambaForCausalLM") and not list(quantized.parameters())
    got = quantized.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(got, expected)
    assert torch.equal(quantized(ids).logits, program(ids)[0])
    assert torch.equal(quantized(ids, logits_to_keep=1).logits, quantized(ids).logits[:, -1:])


def test_a_folder_is_loaded_without_calibration(quantized: Any, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mq-ao" and said["recipe"] == RECIPE and "calibration" not in said
    assert {path.name for path in saved.iterdir()} >= {"config.json", "model.safetensors", PLAN}
    again = opened(saved)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "mq_ao" in record.name]
    ids = tokens(2, 9)
    assert torch.equal(again(ids).logits, quantized(ids).logits)
    for name, tensor in quantized.integers.named_buffers():
        other = dict(again.integers.named_buffers())[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


def test_tied_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    build("Mamba").save_pretrained(tmp_path / "float")
    settings = MambaQuantConfig("rtn-w8a8", BATCHES)  # without R1, embedding and head stay one weight
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=settings)
    model.save_pretrained(tmp_path / "small")
    ids = tokens(2, 9)
    assert torch.equal(opened(tmp_path / "small")(ids).logits, model(ids).logits)


def test_its_program_reads_the_models_own_weights(saved: Path, tmp_path: Path) -> None:
    model, ids = opened(saved), tokens(2, 9)
    logits = model(ids).logits
    own = {tensor.data_ptr() for tensor in model.integers.buffers()}
    assert {tensor.data_ptr() for tensor in model.integers.program.saved.weights.values()} == own
    # And it is a program as any other, that can be saved.
    model.integers.program.save(tmp_path / "program.ptn")
    assert torch.equal(load(tmp_path / "program.ptn")(ids)[0], logits)


def test_padded_prompts_and_their_continuations(quantized: Any) -> None:
    rows = [tokens(1, length, seed=length)[0].clamp(min=1) for length in (5, 9, 9)]
    ids = torch.stack([torch.nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [0]])).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = quantized.generate(ids, attention_mask=mask, **settings)
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(quantized.generate(row[None], **settings)[0, len(row) :], got[9:])


def test_beams_scores_and_sampling(quantized: Any) -> None:
    ids = tokens(2, 6)
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    beams = quantized.generate(ids, num_beams=3, do_sample=False, **settings)
    cacheless = quantized.generate(ids, num_beams=3, do_sample=False, use_cache=False, **settings)
    assert torch.equal(beams, cacheless)
    torch.manual_seed(0)
    sampled = quantized.generate(ids, do_sample=True, return_dict_in_generate=True, output_scores=True, **settings)
    assert sampled.sequences.shape == (2, 12) and len(sampled.scores) == 6


def test_it_goes_on_from_what_a_call_gave(quantized: Any) -> None:
    ids = tokens(2, 10)
    whole = quantized(ids).logits
    first = quantized(ids[:, :4], use_cache=True)
    second = quantized(ids[:, 4:9], past_key_values=first.past_key_values, use_cache=True)
    last = quantized(ids[:, 9:], past_key_values=second.past_key_values, use_cache=True)
    assert last.past_key_values.get_seq_length() == 10
    parts = torch.cat([first.logits, second.logits, last.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0.0, atol=1e-4)  # attention sums in another order
    loss = quantized(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


def test_pipelines_and_streamers(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("Mamba").save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = opened(tmp_path, calibration=[" ".join(WORDS * 4)], tokens=256)
    write = transformers.pipeline("text-generation", model=model, tokenizer=words)
    (answer,) = write("w1 w2", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("w1 w2")
    streamer = transformers.TextStreamer(words)
    given = words("w1 w2", return_tensors="pt", return_token_type_ids=False)
    model.generate(**given, streamer=streamer, max_new_tokens=5, do_sample=False)
    assert capsys.readouterr().out.startswith("w1 w2")


def test_without_text_it_says_what_it_takes(words: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("Mamba").save_pretrained(tmp_path)
    with pytest.raises(MqAoError, match="its tokenizer is not beside it"):
        opened(tmp_path, tokens=512)
    words.save_pretrained(tmp_path)
    model = opened(tmp_path, tokens=512)
    assert "there is no text to calibrate on" in caplog.text and "Python" in caplog.text
    assert model.integers.info["recipe"] == RECIPE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / PLAN).unlink(), f"has no {PLAN}"),
        (lambda folder: (folder / PLAN).write_bytes(b"no plan"), "is not a program saved by mq_ao"),
    ],
)
def test_damaged_folders(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    place = tmp_path / "damaged"
    shutil.copytree(saved, place)
    change(place)
    with pytest.raises(MqAoError, match=message):
        opened(place)


def test_what_is_refused(folder: Path, saved: Path, quantized: Any, tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="unknown recipe"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=MambaQuantConfig("no-such"))
    with pytest.raises(MqAoError, match="run on the CPU here"):
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=MambaQuantConfig(), device_map={"": "cuda:0"}
        )
    place = tmp_path / "newer"
    shutil.copytree(saved, place)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] |= {"format": 99, "version": "9.9"}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(MqAoError, match=r"saved in format 99 by mq-ao 9\.9"):
        opened(place)
    with pytest.raises(MqAoError, match="outside the vocabulary"):
        quantized(torch.full((1, 3), VOCAB))
    with pytest.raises(MqAoError, match="inputs_embeds"):
        quantized(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(MqAoError, match="DynamicCache: give what the last call returned"):
        quantized(tokens(1, 2), past_key_values=transformers.DynamicCache())
    with pytest.raises(MqAoError, match="padding behind a token"):
        quantized.generate(tokens(2, 3), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]), max_new_tokens=2)


def test_a_plan_is_saved_apart_from_its_weights(folder: Path, tmp_path: Path) -> None:
    saved = ours(folder).lower().saved
    saved.write_plan(tmp_path / PLAN)
    read = file.read_plan(tmp_path / PLAN)
    assert all(tensor.is_meta for tensor in read.weights.values())
    assert {name: (t.shape, t.dtype) for name, t in read.weights.items()} == {
        name: (t.shape, t.dtype) for name, t in saved.weights.items()
    }
    assert (read.plan, read.info) == (saved.plan, saved.info)
    written = json.loads((tmp_path / PLAN).read_text())
    written["weights"]["int8_packed_0"][1] = "load"
    (tmp_path / PLAN).write_text(json.dumps(written))
    with pytest.raises(MqAoError, match="is not a program saved by mq_ao, or is damaged"):
        file.read_plan(tmp_path / PLAN)
