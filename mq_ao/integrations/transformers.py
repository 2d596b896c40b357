"""transformers: quantizes and loads models under its own `from_pretrained`, once this module is imported.

```python
import mq_ao.integrations.transformers
from transformers import AutoModelForCausalLM

config = MambaQuantConfig(recipe="mambaquant-w8a8", calibration="text.txt")
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
model.save_pretrained("small")  # integers: loaded again by `from_pretrained`, without calibration
```
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from mq_ao.errors import MqAoError
from mq_ao.extras import needs

with needs("the integration with transformers", "hf"):
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils import cached_file
    from transformers.utils.quantization_config import QuantizationConfigMixin

import torch

from mq_ao import tokenizer as tokenizers
from mq_ao.api import quantize
from mq_ao.backends import NATIVE
from mq_ao.integrations.transformers_model import PLAN, become
from mq_ao.lowering.native import NativeProgram, file
from mq_ao.models import demo
from mq_ao.recipes import get_recipe
from mq_ao.text import calibration as calibration_batches
from mq_ao.version import __version__

logger = logging.getLogger(__name__)

METHOD = "mq-ao"
FORMAT = 2


@register_quantization_config(METHOD)
class MambaQuantConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model.

    Args:
        recipe: name of a recipe, or a recipe file.
        calibration: text to calibrate on: a file, a text or texts (see `mq_ao.text.calibration`), or batches of token
            ids as tensors. None: the text that comes with mq-ao, with a warning: text of the model's own kind is
            better.
        tokens: how many tokens of a text to take.
        tokenizer: of transformers, or its folder; None: the one beside the model.
        format: of a saved folder.
        version: of the mq-ao that saved it.

    Raises:
        MqAoError: there is no such recipe, or a folder has another format.
    """

    def __init__(
        self,
        recipe: str | Path = "mambaquant-w8a8",
        calibration: Any = None,
        *,
        tokens: int = 16384,
        tokenizer: Any = None,
        format: int = FORMAT,
        version: str = __version__,
        **_: Any,
    ) -> None:
        if format != FORMAT:
            raise MqAoError(f"this model was saved in format {format} by mq-ao {version}, this one reads {FORMAT}.")
        self.quant_method = METHOD
        self.recipe, self.calibration, self.tokens, self.tokenizer = recipe, calibration, tokens, tokenizer
        self.format, self.version = format, version

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps: not the text."""
        kept = ("quant_method", "format", "version")
        return {**{name: getattr(self, name) for name in kept}, "recipe": str(self.recipe)}


@register_quantizer(METHOD)
class MambaQuantHfQuantizer(HfQuantizer):
    """Puts an integer program in the place of a model's modules; see `MambaQuantConfig`."""

    quantization_config: MambaQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises MqAoError if the model is to go elsewhere than to the CPU, or there is no such recipe."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if devices - {None, "cpu", "auto", torch.device("cpu")}:
            raise MqAoError(f"device_map is {device_map}: models quantized by mq-ao run on the CPU here; leave it out.")
        if not self.pre_quantized:
            get_recipe(self.quantization_config.recipe)

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU."""
        return None if device_map is None else {"": "cpu"}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What is not quantized runs in float32."""
        return torch.float32

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Integers and scales stay what they are."""
        return

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            become(model, file.read_plan(_plan_of(model)))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            wanted = self.quantization_config
            quantized = quantize(model, self._batches(model), wanted.recipe, tokenizer=wanted.tokenizer)
            become(model, _without_tokenizer(quantized.lower(NATIVE.name)))
        return model

    def _batches(self, model: PreTrainedModel) -> list[Any]:
        wanted = self.quantization_config
        given = wanted.calibration
        if isinstance(given, list | tuple) and given and not isinstance(given[0], str | bytes):
            return list(given)
        if given is None:
            logger.warning(
                "there is no text to calibrate on: mq-ao takes its own, documentation of Python in English. Text of "
                "the model's kind is better: MambaQuantConfig(calibration=...)."
            )
            given = demo.CALIBRATION
        return calibration_batches(given, model if wanted.tokenizer is None else wanted.tokenizer, tokens=wanted.tokens)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers are not trained."""
        return False


def _without_tokenizer(program: Any) -> file.Saved:
    """What a program is made of: the tokenizer is a file beside the model."""
    if not isinstance(program, NativeProgram):
        raise MqAoError("this takes a language model with states, that generates.")
    return replace(program.saved, info={name: said for name, said in program.info.items() if name != tokenizers.INFO})


def _plan_of(model: PreTrainedModel) -> Path:
    """The file with the plan, beside the weights."""
    source = model.config.name_or_path
    found = cached_file(
        source, PLAN, revision=getattr(model.config, "_commit_hash", None), _raise_exceptions_for_missing_entries=False
    )
    if found is None:
        raise MqAoError(f"{source} has no {PLAN}: it is incomplete; copy or save it again.")
    return Path(found)
