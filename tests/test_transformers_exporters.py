"""transformers' exporters with formats of ours: its own classes find, run, save and load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers.exporters", reason='needs transformers 5.23: pip install "mq-ao[hf]"')

from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
from transformers.exporters import AutoExportConfig, AutoHfExporter, DynamoConfig, ExecutorchConfig, ExportedModel
from transformers.exporters.quantizers import PT2EQuantizer

from mq_ao import MqAoError, api
from mq_ao.integrations.transformers_exporters import MambaExportQuantizer
from mq_ao.lowering.stateful_graph import StatefulGraph
from tests.test_capture_transformers import VOCAB, build

RECIPE = "mambaquant-w8a8"


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [{"input_ids": tokens(2, 64, seed=seed), "attention_mask": torch.ones(2, 64)} for seed in (11, 12)]


def test_a_language_model_is_exported_run_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = build("Mamba"), tokens(3, 12)
    config = DynamoConfig("mq-ao", quantizer=MambaExportQuantizer(RECIPE, BATCHES))
    exported = AutoHfExporter.from_config(config).export_for_generation(model, {**BATCHES[0]}, config)
    assert exported.program.integer_kernels
    logits = exported(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    simulated = StatefulGraph(api.quantize(model, [batch["input_ids"] for batch in BATCHES], RECIPE).converted)
    # Integers against their simulation in float: values on the border between two integers.
    assert (logits - simulated(ids)[0]).norm() < 0.02 * logits.norm()
    assert exported.program.generate(ids, 5).shape == (3, 17)
    exported.save_pretrained(tmp_path)
    again = ExportedModel.from_pretrained(tmp_path)
    assert type(again.config) is type(model.config) and again.generation_config is not None
    assert torch.equal(again(input_ids=ids).logits, logits)
    assert again.device == torch.device("cpu") and again.dtype == torch.float32
    with pytest.raises(MqAoError, match="takes no attention_mask"):
        again(input_ids=ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(MqAoError, match="device is cuda: these programs run on the CPU"):
        ExportedModel.from_pretrained(tmp_path, device="cuda")


def test_other_models_give_what_they_give(tmp_path: Path) -> None:
    backbone = build("Mamba").backbone
    batches = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    config = AutoExportConfig.from_dict(
        {"export_format": "mq-ao", "quantizer": MambaExportQuantizer("rtn-w8a8", batches)}
    )
    exported = AutoHfExporter.from_config(config).export(backbone, batches[0], config)
    exported.save_pretrained(tmp_path)
    ids = tokens(3, 12)
    got = ExportedModel.from_pretrained(tmp_path)(input_ids=ids)
    simulated = api.quantize(backbone, batches, "rtn-w8a8").converted(input_ids=ids)
    assert type(got) is type(simulated) is type(backbone(ids))
    difference = got.last_hidden_state - simulated.last_hidden_state
    assert difference.norm() < 0.02 * got.last_hidden_state.norm()


def test_a_program_for_executorch(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason='needs executorch: pip install "mq-ao[executorch]"')
    config = ExecutorchConfig("mq-ao-executorch", quantizer=MambaExportQuantizer(RECIPE, BATCHES))
    ids = tokens(1, 12)
    exported = AutoHfExporter.from_config(config).export(build("Mamba"), {"input_ids": ids}, config)
    exported.save_pretrained(tmp_path)
    again = ExportedModel.from_pretrained(tmp_path)
    assert again.program.integer_kernels and torch.equal(again(input_ids=ids).logits, exported(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (None, r"has no quantizer: give DynamoConfig\(quantizer=MambaExportQuantizer"),
        (PT2EQuantizer(X86InductorQuantizer()), "has a PT2EQuantizer"),
    ],
)
def test_what_is_refused(quantizer: Any, message: str) -> None:
    config = DynamoConfig("mq-ao", quantizer=quantizer)
    with pytest.raises(MqAoError, match=message):
        AutoHfExporter.from_config(config).export(build("Mamba"), {**BATCHES[0]}, config)


def test_formats_of_others_refuse_our_quantizer() -> None:
    config = DynamoConfig(quantizer=MambaExportQuantizer())
    with pytest.raises(ValueError, match="MambaExportQuantizer quantizes mq-ao, mq-ao-executorch exports"):
        AutoHfExporter.from_config(config).export(build("Mamba"), {**BATCHES[0]}, config)
