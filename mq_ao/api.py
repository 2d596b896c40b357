"""`quantize` and `load`: the whole walk from a float model to a quantized program."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from mq_ao import passes
from mq_ao.calibrate import calibrate, check_weights
from mq_ao.capture import export
from mq_ao.errors import MqAoError
from mq_ao.files import PROGRAM_SUFFIXES, check_output
from mq_ao.graph import match, walk
from mq_ao.lowering import cuda, executorch, inductor
from mq_ao.memory import release
from mq_ao.models import MambaLM
from mq_ao.models.program import LanguageProgram
from mq_ao.quantizer import MambaQuantizer, QuantizationReport
from mq_ao.quantizer.backends import check_backend
from mq_ao.recipes import Recipe, get_recipe
from mq_ao.report import build, sizes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What was matched, rewritten, quantized and left out, and why.

    Attributes:
        recipe: the recipe that was applied.
        backend: whose integers the activations are.
        match: blocks, head and embeddings of the float graph, as text.
        transforms: what the rewrites did, and where they were left out.
        quantization: the quantizer's decisions.
        batches: number of calibration batches.
        tokens: number of calibration tokens, or 0 where the inputs are no token ids.
    """

    recipe: Recipe
    backend: str
    match: str
    transforms: tuple[passes.Transform, ...]
    quantization: QuantizationReport
    batches: int
    tokens: int = 0

    def __str__(self) -> str:
        left_out = [str(item) for item in self.transforms if item.status is passes.Status.LEFT_OUT]
        lines = [str(self.recipe), f"for {self.backend}, calibrated on {self.batches} batches"]
        if self.transforms:
            lines.append(f"{len(self.transforms) - len(left_out)} rewrites applied, {len(left_out)} left out")
        return "\n".join([*lines, *left_out, str(self.quantization)])


class QuantizedProgram:
    """A quantized graph in torchao's q/dq form, ready to be lowered.

    Args:
        converted: result of `convert_pt2e`: integers simulated in float.
        report: what was done to get there.
        vocab_size: of a language model, else None.
        source: the rewritten float graph and a few inputs, for `report(html=...)`. Float weights that rewrites made
            stay in memory with it; `lower` does not need them, and what it returns does not hold them.
        known_tokens: tokens of a language model that its tokenizer knows, where the model tells.
    """

    def __init__(
        self,
        converted: GraphModule,
        report: Report,
        vocab_size: int | None,
        source: build.Source,
        known_tokens: int | None = None,
    ) -> None:
        self.converted = converted
        self._report = report
        self._vocab_size = vocab_size
        self._source = source
        self._known = {} if known_tokens is None else {"known_tokens": known_tokens}

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

    def lower(self, backend: str | None = None, options: executorch.Options | None = None) -> LanguageProgram | Any:
        """Compiles the graph to a program that can be called, saved, and loaded by `load`.

        That of a `MambaLM` is a `LanguageProgram`: prefill, decode and generation. That of any other model is a
        `Program`, which is called with the model's inputs and gives what the model gives.

        Args:
            backend: the one that the graph was quantized for; None: that one.
            options: batch, longest prefill and more, for `executorch`.

        Raises:
            MqAoError: unknown or other backend, nothing quantized, or a graph that cannot be saved as a program.
        """
        wanted = self._report.backend
        if backend is not None and check_backend(backend).name != wanted:
            raise MqAoError(
                f"this graph was quantized for {wanted}, whose integers are not those of {backend}: "
                f"call mq_ao.quantize(..., backend={backend!r})."
            )
        info = {"recipe": self._report.recipe.name}
        if options is not None and wanted != "executorch":
            raise MqAoError("options are for programs of executorch.")
        if self._vocab_size is None:
            if wanted == "executorch":
                return executorch.lower_module(self.converted, info, options)
            return (cuda if wanted == "cuda" else inductor).lower_module(self.converted, info)
        described = {**info, "vocab_size": self._vocab_size, **self._known}
        if wanted == "executorch":
            return executorch.lower(self.converted, described, options)
        return (cuda if wanted == "cuda" else inductor).lower_language_model(self.converted, described)


def capture(model: nn.Module, example: tuple[Any, ...]) -> GraphModule:
    """Exports `model` and returns the graph that passes and quantizer work on.

    A `MambaLM` is captured with explicit states whatever `example` holds.
    """
    if isinstance(model, MambaLM):
        ids = torch.zeros(2, 8, dtype=torch.int64)
        example = (ids, *model.initial_states(2))
    return export(model, example).module(check_guards=False)


def quantize(
    model: nn.Module,
    calibration: Iterable[Tensor | tuple[Any, ...]],
    recipe: str | Recipe = "mambaquant-w8a8",
    *,
    backend: str = "inductor",
    progress: bool = False,
) -> QuantizedProgram:
    """Captures, rewrites, calibrates and converts a trained model.

    Args:
        model: float model in eval mode. It is not changed.
        calibration: inputs of the model, one element a batch: a tensor (batch, length) of token ids, or a tuple of
            positional inputs. Not data that the result is evaluated on. A generator is read once.
        recipe: name of a recipe (`mq_ao.recipes.RECIPES`), a recipe file, or a recipe.
        backend: what runs the result: "inductor" (this machine's CPU), "executorch" (a `.pte` for edge devices) or
            "cuda" (a GPU). Activations become the integers that its kernels take.
        progress: show progress bars on stderr.

    Returns:
        The quantized graph, with its report.

    Raises:
        MqAoError: unknown recipe or backend, a spec that the backend has no kernel for, bad calibration data, NaN or
            Inf on the way, or no Mamba block in the model.
    """
    chosen = get_recipe(recipe)
    # Before anything takes long: it says what the backend has no kernel for.
    quantizer = MambaQuantizer(backend).set_global(chosen.scheme)
    check_weights(model)
    lengths: list[int] = []
    batches = _batches(model, calibration, lengths)
    first = next(batches, None)
    if first is None:
        raise MqAoError("calibration is empty: give at least one batch of inputs.")
    # Statistics and ranges are two runs over the same data.
    given = [first, *batches] if chosen.needs_statistics else _chain(first, batches)
    graph = capture(model, first)
    # Before anything takes long.
    walk.check_scans(graph, quantizer.backend.scans, quantizer.backend.name)
    stored = sizes.stored(graph, sizes.roles(graph))
    rewrite = passes.apply(graph, chosen.passes, given, progress=progress)
    source = build.Source.of(type(model).__name__, stored, rewrite, first)
    description = match(graph).describe()
    rewrite.statistics = {}  # of no more use, and large
    release()
    if requests := quantizer.requests(graph):
        quantizer.set_statistics(passes.collect(graph, requests, given, progress=progress))
    prepared = prepare_pt2e(graph, quantizer)
    release()
    count = calibrate(prepared, given, progress=progress)
    converted = convert_pt2e(prepared, fold_quantize=False)  # weights are integers already
    vocab_size = model.config.vocab_size if isinstance(model, MambaLM) else None
    report = Report(
        chosen, quantizer.backend.name, description, tuple(rewrite.transforms), quantizer.report, count, sum(lengths)
    )
    known_tokens = model.known_tokens if isinstance(model, MambaLM) else None
    return QuantizedProgram(converted, report, vocab_size, source, known_tokens)


def compile_float(
    model: MambaLM, backend: str = "inductor", options: executorch.Options | None = None
) -> LanguageProgram:
    """Compiles the float graph of a language model the same way as a quantized one, for comparison."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    info = {"recipe": dtype, "vocab_size": model.config.vocab_size}
    if model.known_tokens is not None:
        info["known_tokens"] = model.known_tokens
    check_backend(backend)
    if backend == "executorch":
        return executorch.lower_float(capture(model, ()), info, options)
    if backend == "cuda":
        return cuda.float_language_model(capture(model, ()), info)
    return inductor.compile_float_language_model(capture(model, ()), info)


def load(path: str | Path) -> LanguageProgram | Any:
    """Loads a program that `save` wrote: `.pt2` (inductor), `.pte` (executorch) or `.ptc` (cuda).

    A program for cuda runs on the GPU if there is one, else on the CPU, slowly; `mq_ao.lowering.cuda.load` can choose.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version.
    """
    if Path(path).suffix == PROGRAM_SUFFIXES["executorch"]:
        return executorch.load(path)
    if Path(path).suffix == PROGRAM_SUFFIXES["cuda"]:
        return cuda.load(path)
    return inductor.load(path)


def _chain(first: tuple[Any, ...], rest: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    yield first
    yield from rest


def _batches(
    model: nn.Module, calibration: Iterable[Tensor | tuple[Any, ...]], lengths: list[int]
) -> Iterator[tuple[Any, ...]]:
    """Checked batches with their states; the number of tokens of each is appended to `lengths`."""
    if isinstance(calibration, Tensor):
        raise MqAoError("calibration is one tensor: give an iterable of batches, for example [tensor].")
    zeros: dict[int, tuple[Tensor, Tensor]] = {}
    for index, batch in enumerate(calibration):
        args = batch if isinstance(batch, tuple) else (batch,)
        if not all(isinstance(arg, Tensor) for arg in args) or not args:
            raise MqAoError(f"calibration batch {index} is not a tensor or a tuple of tensors.")
        if isinstance(model, MambaLM):
            _check_ids(model, args[0], index)
            lengths.append(args[0].numel())
            if len(args) == 1:
                # One pair for all batches of a size: nothing writes to it.
                size = args[0].shape[0]
                args = (args[0], *zeros.setdefault(size, model.initial_states(size)))
        yield args


def _check_ids(model: MambaLM, ids: Tensor, index: int) -> None:
    vocab_size = model.config.vocab_size
    if ids.dtype != torch.int64 or ids.dim() != 2:
        raise MqAoError(
            f"calibration batch {index} is {tuple(ids.shape)} {ids.dtype}: token ids are (batch, length) int64."
        )
    if ids.numel() == 0:
        raise MqAoError(f"calibration batch {index} is empty, of shape {tuple(ids.shape)}: give at least one token.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise MqAoError(
            f"calibration batch {index} holds token ids {int(ids.min())}..{int(ids.max())}, outside the vocabulary "
            f"of {vocab_size} tokens: tokenize with the model's own tokenizer."
        )
