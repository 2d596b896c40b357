"""What `quantize` gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from mq_ao import tokenizer as tokenizers
from mq_ao.backends import get_backend
from mq_ao.errors import MqAoError
from mq_ao.files import check_output
from mq_ao.models.program_interface import LanguageProgram
from mq_ao.report import build
from mq_ao.report.summary import Report
from mq_ao.turns import in_turn


class QuantizedModel:
    """A quantized model: its graph in torchao's q/dq form, ready to be lowered to a program that runs on integers.

    Args:
        converted: result of `convert_pt2e`: integers simulated in float. It can be called as the captured model.
        report: what was done to get there.
        info: what programs are to say of the model; of a language model also `vocab_size`, and `known_tokens` where
            its tokenizer knows fewer.
        source: the rewritten float graph and a few inputs, for `report(html=...)`. Float weights that rewrites made
            stay in memory with it; `lower` does not need them, and what it returns does not hold them.
    """

    def __init__(self, converted: GraphModule, report: Report, info: Mapping[str, Any], source: build.Source) -> None:
        self.converted = converted
        self._report = report
        self._info = info
        self._source = source

    def keeping(self, tokenizer: Mapping[str, str]) -> QuantizedModel:
        """The same, whose programs keep a tokenizer, if they are of a language model."""
        said = {**self._info, tokenizers.INFO: dict(tokenizer)} if "vocab_size" in self._info else self._info
        return QuantizedModel(self.converted, self._report, said, self._source)

    def report(self, html: str | Path | None = None, *, title: str | None = None) -> Report:
        """What was matched, rewritten, quantized and left out, and why; `print` it.

        Args:
            html: also write a page there, ending in .html, with plots of variances and ranges, and the signal to
                noise ratio of every quantized node; that runs both graphs on at most 2 x 256 tokens.
            title: heading of the page; the class of the model if not given.

        Raises:
            MqAoError: the page cannot be written there.
        """
        if html is not None:
            from mq_ao.report import page  # with matplotlib, which takes long to load

            path = check_output(html, ".html")
            page.write(build.page_data(self.converted, self._report, self._source, title), path)
        return self._report

    @in_turn
    def lower(self, backend: str | None = None, options: Any = None) -> LanguageProgram | Any:
        """Compiles the graph to a program that can be called, saved, and loaded by `load`.

        That of a `MambaLM` is a `LanguageProgram`: prefill, decode and generation. That of any other model is a
        `Program`, which is called with the model's inputs and gives what the model gives.

        Args:
            backend: the one that the graph was quantized for, or one with its integers; None: that one.
            options: of that backend: `mq_ao.lowering.executorch.Options` has batch, longest prefill and more.

        Raises:
            MqAoError: unknown or other backend, nothing quantized, or a graph that cannot be saved as a program.
        """
        quantized_for = get_backend(self._report.backend)
        wanted = quantized_for if backend is None else get_backend(backend)
        if wanted.integers != quantized_for.integers:
            raise MqAoError(
                f"this graph was quantized for {quantized_for.name}, whose integers are not those of {backend}: "
                f"call mq_ao.quantize(..., backend={backend!r})."
            )
        return wanted.lowering.lower(self.converted, self._described, options)

    @property
    def _described(self) -> dict[str, Any]:
        """What programs say of themselves."""
        return {"recipe": self._report.recipe.name, **self._info}
