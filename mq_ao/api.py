"""`quantize`: the whole walk from a float model to a quantized program."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from mq_ao import models, passes
from mq_ao import tokenizer as tokenizers
from mq_ao.backends import DEFAULT, INDUCTOR, get_backend
from mq_ao.calibration import Calibration
from mq_ao.calibration.calls import Call
from mq_ao.calibration.graph_inputs import tokens
from mq_ao.capture import export
from mq_ao.capture.by_hand import Scans, using_scans
from mq_ao.capture.carrying import carries_states
from mq_ao.capture.precision import check_weights, float_dtype, in_float32
from mq_ao.capture.stateful_export import export_with_states
from mq_ao.capture.unwrapping import unwrapped
from mq_ao.compat.tracing import size_checks
from mq_ao.errors import MqAoError
from mq_ao.graph import match, walk
from mq_ao.graph.buffers import written
from mq_ao.graph.partial import Batch
from mq_ao.lowering.language_graphs import find_states, head_of
from mq_ao.lowering.patterns import DEQUANTIZE
from mq_ao.lowering.stateful_graph import StatefulGraph
from mq_ao.memory import release
from mq_ao.models import Logits, MambaLM
from mq_ao.models.program_interface import LanguageProgram
from mq_ao.modes import plain
from mq_ao.prepared import Prepared
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer import MambaQuantizer, QuantizationReport
from mq_ao.recipes import Recipe, get_recipe
from mq_ao.report import build
from mq_ao.report.summary import Report
from mq_ao.rewritten import Rewritten
from mq_ao.training import TrainableModel
from mq_ao.turns import in_turn

logger = logging.getLogger(__name__)


def capture(model: nn.Module, example: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    """Exports `model` and returns the graph that passes and quantizer work on, which checks the sizes it is given.

    A `MambaLM` is captured with explicit states whatever `example` holds. A graph that was captured before is copied,
    on the same tensors.
    """
    if isinstance(model, GraphModule):
        return _copied(model)
    if isinstance(model, MambaLM):
        example = (torch.zeros(2, 8, dtype=torch.int64), *model.initial_states(2))
        any_batch = {1: Dim.DYNAMIC}
        shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, any_batch, any_batch)
        return export(model, example, dynamic_shapes=shapes).module(check_guards=False)
    return export(model, example, kwargs).module()


@in_turn
def quantize(
    model: nn.Module | ExportedProgram | str | Path,
    calibration: Iterable[Any],
    recipe: str | Path | Recipe = "mambaquant-w8a8",
    *,
    backend: str = DEFAULT.name,
    scans: Scans | None = None,
    tokenizer: Any = None,
    progress: bool = False,
) -> QuantizedModel:
    """Captures, rewrites, calibrates and converts a trained model.

    Args:
        model: float model in eval mode, of any floating dtype: what is not quantized runs in float32. It is not
            changed in the end; let no other thread run it meanwhile. Or the name or folder of one (see
            `MambaLM.from_pretrained`), or what `mq_ao.export` gave.
        calibration: inputs of the model, one element a batch: a tensor, a tuple or list of positional inputs, or a
            mapping of keyword inputs such as a tokenizer gives (`input_ids`, `attention_mask`); arrays and lists of
            token ids too. Padding that an `attention_mask` tells does not count. Not data that the result is evaluated
            on. A generator is read once.
        recipe: name of a recipe (`mq_ao.recipes.RECIPES`), a recipe file, or a recipe.
        backend: what runs the result: "native" (a CPU, without compiling), "inductor" (this machine's CPU),
            "executorch" (a `.pte` for edge devices) or "cuda" (a GPU). Activations become the integers that its
            kernels take; those of "native" and "inductor" are the same.
        scans: the model's own functions that compute a scan; see `mq_ao.export`.
        tokenizer: of transformers, or its folder or hub id, for programs of a language model to keep, so that they
            read text. None: the one in the folder that the model comes from, if there is one.
        progress: show progress bars on stderr.

    Returns:
        The quantized graph, with its report.

    Raises:
        MqAoError: unknown recipe or backend, a spec that the backend has no kernel for, bad calibration data, NaN or
            Inf on the way, or no Mamba block in the model.
    """
    with plain(), using_scans(scans or {}):
        kept = _tokenizer(model, tokenizer)
        quantized = _prepared(model, calibration, recipe, backend, progress).quantized()
        return quantized.keeping(kept) if kept else quantized


@in_turn
def prepare_qat(
    model: nn.Module | ExportedProgram | str | Path,
    calibration: Iterable[Any],
    recipe: str | Path | Recipe = "mambaquant-w4a8",
    *,
    backend: str = DEFAULT.name,
    scans: Scans | None = None,
    progress: bool = False,
) -> TrainableModel:
    """The rewritten model as a module to train, whose weights and activations are rounded as programs round them.

    Args:
        model: see `quantize`; it is not changed.
        calibration: see `quantize`: for statistics, ranges and the scales that training begins with.
        recipe: see `quantize`.
        backend: see `quantize`.
        scans: see `quantize`.
        progress: see `quantize`.

    Returns:
        A module; train it, and call `convert` for a `QuantizedModel`.

    Raises:
        MqAoError: see `quantize`; or the model has a scan without a gradient, which Mamba-2's is.
    """
    with plain(), using_scans(scans or {}):
        prepared = _prepared(model, calibration, recipe, backend, progress)
    return TrainableModel(prepared)


def _prepared(
    model: nn.Module | ExportedProgram | str | Path,
    data: Iterable[Any],
    recipe: str | Path | Recipe,
    backend: str,
    progress: bool,
) -> Prepared:
    chosen = get_recipe(recipe)
    # Before anything takes long: it says what the backend has no kernel for.
    quantizer = chosen.quantizer(backend)
    with _calibrating(model, data) as (opened, calibration):
        graph = _rewritten(opened, calibration, chosen, quantizer, progress, keep=chosen.needs_statistics)
        return graph.prepared(chosen, quantizer, graph.statistics(quantizer, progress), progress)


@in_turn
def rewrite(
    model: nn.Module | ExportedProgram | str | Path,
    calibration: Iterable[Any],
    recipe: str | Path | Recipe,
    *,
    backend: str = DEFAULT.name,
    progress: bool = False,
) -> Rewritten:
    """The first half of `quantize`, to quantize one rewritten graph in several ways.

    Args:
        model: see `quantize`.
        calibration: see `quantize`; all of it is kept.
        recipe: see `quantize`: its passes are applied.
        backend: see `quantize`.
        progress: see `quantize`.

    Raises:
        MqAoError: see `quantize`.
    """
    chosen = get_recipe(recipe)
    quantizer = chosen.quantizer(backend)
    with plain(), _calibrating(model, calibration) as (opened, data):
        return _rewritten(opened, data, chosen, quantizer, progress, keep=True)


@contextmanager
def _calibrating(
    model: nn.Module | ExportedProgram | str | Path, data: Iterable[Any]
) -> Iterator[tuple[nn.Module, Calibration]]:
    """The opened model, and its calibration data."""
    opened = _opened(model)
    check_weights(opened)
    stateful = isinstance(opened, MambaLM) or carries_states(_inner(opened))
    calibration = Calibration(opened, data, _vocab_size(opened), takes_mask=not stateful)
    with closing(calibration), plain():  # again, after code of the user's
        yield opened, calibration


def _rewritten(
    model: nn.Module,
    calibration: Calibration,
    recipe: Recipe,
    quantizer: MambaQuantizer,
    progress: bool,
    *,
    keep: bool,
) -> Rewritten:
    """The walk; what takes long comes after everything that can be refused."""
    dtype = float_dtype(model)
    graph = _captured(model, calibration.first)
    info = _info(model, graph)
    quantizer.check(graph)
    captured = build.Captured.of(type(model).__name__, graph)
    example, batches = _batches(calibration.inputs(graph, find_states(graph)), keep=keep)
    rewrite = passes.apply(graph, recipe.passes, batches, progress=progress)
    source = captured.rewritten(rewrite, example)
    report = Report(
        *(recipe, quantizer.kernels.backend, match(graph).describe(), tuple(rewrite.transforms)),
        *(QuantizationReport(()), 0, 0, str(dtype).removeprefix("torch.")),
    )
    del rewrite  # its statistics are of no more use, and large
    release()
    return Rewritten(graph, batches, calibration, report, info, source)


def _captured(model: nn.Module, first: Call) -> GraphModule:
    """The float32 graph that is edited from here on, of transformers' language models with states if it can be."""
    if isinstance(model, GraphModule) and (dtype := float_dtype(model)) != torch.float32:
        raise MqAoError(f"this graph was captured in {dtype}: give mq_ao.export a model in float32 (model.float()).")
    if isinstance(model, GraphModule) and any(node.target in DEQUANTIZE for node in model.graph.nodes):
        raise MqAoError("this graph is quantized already: give the float one.")
    with in_float32(model):
        graph = _with_states(model, first) or capture(model, first.args, first.kwargs)
    if (name := written(graph)) is not None:
        raise MqAoError(
            f"the model writes to its buffer or input {name} while it runs, and calibration would change it: compute a "
            "new tensor, and return what the next call needs of it."
        )
    return graph


def _with_states(model: nn.Module, first: Call) -> GraphModule | None:
    """A language model of transformers with its states; None where it is none, or is given more than ids."""
    given = (*first.args, *first.kwargs.values())
    if not carries_states(_inner(model)) or len(given) != 1 or tokens(*given) == 0:
        return None
    try:
        return export_with_states(_inner(model)).module(check_guards=False)
    except MqAoError as error:
        logger.warning("captured without states, so that programs cannot decode token by token: %s", error)
        return None


@in_turn
@plain()
def generating(model: nn.Module) -> StatefulGraph:
    """A float language model of transformers that goes on from its states, captured.

    Raises:
        MqAoError: it carries none, or such as cannot be captured.
    """
    inner = _inner(model)
    with in_float32(inner):
        return StatefulGraph(_stateful(inner))


def _stateful(model: nn.Module) -> GraphModule:
    """A language model with its states."""
    if isinstance(model, MambaLM):
        return capture(model, ())
    if not carries_states(model):
        raise MqAoError(f"{type(model).__name__} has no states that it could go on from, and cannot generate.")
    return export_with_states(model).module(check_guards=False)


def _inner(model: nn.Module) -> nn.Module:
    """The model of transformers that a function of ids alone runs."""
    return model.model if isinstance(model, Logits) else model


def _batches(inputs: Iterator[Batch], *, keep: bool) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all; those of statistics run twice and are kept."""
    first = next(inputs)
    batches = chain([first], inputs)
    return first, [*batches] if keep else batches


def _tokenizer(model: Any, named: Any) -> dict[str, str]:
    """Files of the tokenizer that is named, or found where a model comes from; empty if there is none."""
    if named is not None:
        return tokenizers.files(named)
    source = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "name_or_path", None)
    if not source or not tokenizers.is_beside(source):
        return {}
    try:
        return tokenizers.files(source)
    except MqAoError as error:
        logger.warning("programs will not keep the tokenizer: %s", error)
        return {}


def _info(model: nn.Module, graph: GraphModule) -> dict[str, Any]:
    """What a program says of the model: of a language model with states, which tokens there are."""
    (output,) = graph.graph.find_nodes(op="output")
    results: Any = output.args[0]
    if find_states(graph) is None or head_of(results[0]).target not in walk.LINEAR:
        return {}
    vocabulary = {"vocab_size": int(walk.value(results[0]).shape[-1])}
    known = model.known_tokens if isinstance(model, MambaLM) else None
    return vocabulary if known is None else {**vocabulary, "known_tokens": known}


@in_turn
@plain()
def compile_float(model: nn.Module, backend: str = INDUCTOR.name, options: Any = None) -> LanguageProgram:
    """Compiles the float graph of a language model, for comparison.

    By Inductor, if no other backend is named: native programs have no fused kernels for what lies between float
    operators, and decode at half the speed.

    Raises:
        MqAoError: unknown backend or options, or the model carries no states.
    """
    model = _inner(unwrapped(model))
    lowering = get_backend(backend).lowering
    dtype = str(float_dtype(model)).removeprefix("torch.")
    with in_float32(model):
        graph = _stateful(model)
        return lowering.lower_float(graph, {"recipe": dtype, **_info(model, graph)}, options)


def _opened(model: nn.Module | ExportedProgram | str | Path) -> nn.Module:
    if isinstance(model, str | Path):
        return models.load(model)
    return model.module() if isinstance(model, ExportedProgram) else unwrapped(model)


def _copied(module: GraphModule) -> GraphModule:
    """A graph to edit, on the same tensors."""
    copied = GraphModule(module, copy.deepcopy(module.graph))
    if find_states(copied) is not None:
        # Programs with states check what they are given themselves, and turn states into buffers.
        for node in size_checks(copied):
            copied.graph.erase_node(node)
        copied.recompile()
    return copied


def _vocab_size(model: nn.Module) -> int | None:
    """The number of tokens that a model knows, as far as it says so."""
    if isinstance(model, MambaLM):
        return model.config.vocab_size
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()  # transformers' models
    except NotImplementedError:  # of those without
        return None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
