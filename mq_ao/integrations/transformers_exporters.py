"""transformers' exporters: two more formats, `mq-ao` and `mq-ao-executorch`, once this module is imported.

```python
from mq_ao.integrations.transformers_exporters import MambaExportQuantizer
from transformers.exporters import AutoHfExporter, DynamoConfig, ExportedModel

config = DynamoConfig("mq-ao", quantizer=MambaExportQuantizer("mambaquant-w8a8", batches))
exported = AutoHfExporter.from_config(config).export(model, {"input_ids": ids}, config)
exported.save_pretrained("small")
ExportedModel.from_pretrained("small")(input_ids=ids).logits
```

transformers' own formats trace a scan as the model spells it, operator by operator; these capture it as one operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from mq_ao.errors import MqAoError
from mq_ao.extras import needs

with needs("the integration with transformers' exporters", "hf"):
    import transformers
try:
    from transformers.exporters import (
        DynamoConfig,
        ExecutorchConfig,
        ExportedModel,
        ExportMetadata,
        ExportQuantizer,
        HfExporter,
        ModelRunner,
        register_backend,
    )
except ImportError as error:
    raise MqAoError(
        f"transformers {transformers.__version__} has no exporters that others can add to: version 5.23 has."
    ) from error

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mq_ao.api import quantize
from mq_ao.loading import load
from mq_ao.quantized import QuantizedModel
from mq_ao.recipes import Recipe, get_recipe

FORMATS = {"mq-ao": "inductor", "mq-ao-executorch": "executorch"}
"""Export formats, and the backends that run them."""


class MambaExportQuantizer(ExportQuantizer):
    """How the formats of mq-ao quantize; it goes into `DynamoConfig` or `ExecutorchConfig`.

    transformers' `PT2EQuantizer` cannot take its place: rewrites come before the annotation that it begins with.

    Args:
        recipe: name of a recipe, a recipe file, or a recipe.
        calibration_dataset: batches of the model's inputs by name, not what it is evaluated on; None: the one sample
            that is exported, with a warning.

    Raises:
        MqAoError: there is no such recipe.
    """

    supported_formats = tuple(FORMATS)
    required_packages = ("torch", "torchao")

    def __init__(
        self,
        recipe: str | Path | Recipe = "mambaquant-w8a8",
        calibration_dataset: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(calibration_dataset)
        self.recipe = get_recipe(recipe)

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: str) -> QuantizedModel:
        """Captures, rewrites, calibrates and converts a float model; see `mq_ao.quantize`."""
        batches = self.traced_calibration(sample_inputs)
        return quantize(model, batches, self.recipe, backend=FORMATS[export_format])


class MambaExporter(HfExporter):
    """Quantizes a model and compiles it for this machine's CPU: a `.pt2`.

    Batch and length vary whatever the configuration says of dynamic shapes. A language model's program,
    `exported.program`, has its states: `generate`, `prefill` and `decode`.
    """

    export_format = "mq-ao"
    config_class = DynamoConfig
    program_suffix = ".pt2"
    required_packages: ClassVar[list[str]] = ["torch", "torchao"]

    def export_program(
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: DynamoConfig
    ) -> tuple[Any, ExportMetadata]:
        """See `HfExporter`.

        Raises:
            MqAoError: the configuration has no `MambaExportQuantizer`, or see `mq_ao.quantize`.
        """
        quantizer = config.quantizer
        if not isinstance(quantizer, MambaExportQuantizer):
            given = "no quantizer" if quantizer is None else f"a {type(quantizer).__name__}"
            raise MqAoError(
                f"format {self.export_format} quantizes, and the configuration has {given}: give "
                f"{type(config).__name__}(quantizer=MambaExportQuantizer(recipe, calibration_dataset))."
            )
        inputs = {name: value for name, value in sample_inputs.items() if isinstance(value, torch.Tensor)}
        quantized = quantizer.quantize(model, inputs, self.export_format)
        metadata = ExportMetadata(
            architecture=type(model).__name__,
            packages={name: version(name) for name in self.required_packages},
            export_dtype="float32",
            export_device="cpu",
            kwargs={name: {"shape": [*value.shape], "dtype": str(value.dtype)[6:]} for name, value in inputs.items()},
        )
        return self.lower(quantized, inputs), metadata

    def lower(self, quantized: QuantizedModel, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The program of a quantized model."""
        return quantized.lower()

    def export_for_generation(
        self,
        model: PreTrainedModel,
        sample_inputs: MutableMapping[str, Any],
        config: DynamoConfig,
        *,
        generation_config: Any = None,
        multi_token_decode: bool = False,
    ) -> ExportedModel:
        """One component, whose program has prefill and decode: `exported.program.generate(input_ids)`."""
        exported = self.export(model, sample_inputs, config)
        exported.generation_config = generation_config or model.generation_config
        return exported

    @classmethod
    def save_program(cls, program: Any, path: str | Path) -> None:
        """See `HfExporter`."""
        program.save(path)

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        """See `HfExporter`."""
        return load(path)


class MambaExecutorchExporter(MambaExporter):
    """Quantizes a model and lowers it for ExecuTorch: a `.pte` of the sample's batch."""

    export_format = "mq-ao-executorch"
    config_class = ExecutorchConfig
    program_suffix = ".pte"
    required_packages: ClassVar[list[str]] = ["torch", "torchao", "executorch"]

    def lower(self, quantized: QuantizedModel, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The program of a quantized model."""
        from mq_ao.lowering.executorch import Options

        return quantized.lower(options=Options(batch=len(next(iter(inputs.values())))))


class MambaRunner(ModelRunner):
    """Calls a program by the names of the model's inputs."""

    def __init__(self, program: Any, metadata: ExportMetadata) -> None:
        self.program, self.metadata = program, metadata  # how outputs are put together, the program knows

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu")

    @classmethod
    def from_program(cls, program: Any, metadata: ExportMetadata, device: Any = None) -> MambaRunner:
        """See `ModelRunner`.

        Raises:
            MqAoError: another device than the CPU is asked for.
        """
        if device is not None and torch.device(device).type != "cpu":
            raise MqAoError(f"device is {device}: these programs run on the CPU.")
        return cls(program, metadata)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """What the model gives; of a language model the logits (batch, length, vocab_size).

        Raises:
            MqAoError: the inputs are not those of the model, or are padded where it has states.
        """
        if "vocab_size" not in self.program.info:
            return self.program(**kwargs)
        mask = kwargs.pop("attention_mask", None)
        logits, *_ = self.program(**kwargs, attention_mask=None if mask is None or bool(mask.all()) else mask)
        return CausalLMOutput(logits=logits)


for _exporter in (MambaExporter, MambaExecutorchExporter):
    register_backend(_exporter, MambaRunner)
