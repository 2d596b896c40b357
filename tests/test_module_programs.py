"""Programs of modules that are no `MambaLM`: called as the module is, saved, loaded, and careful with their inputs."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mq_ao
from mq_ao import MqAoError
from mq_ao.backends import get_backend
from mq_ao.lowering.executorch import Options, Scan
from mq_ao.lowering.guards import Guard
from mq_ao.lowering.language_graphs import find_states
from mq_ao.lowering.module_export import export_module, refuse_memory
from mq_ao.lowering.module_program import ModuleProgram
from mq_ao.lowering.signature import Signature
from mq_ao.models import Vim, VimConfig
from mq_ao.models.config import MambaConfig
from mq_ao.models.mamba import MambaMixer
from tests.blocks import Blocks
from tests.conftest import CommandLine, error

HAVE_EXECUTORCH = importlib.util.find_spec("executorch") is not None
BACKENDS = ["inductor", "native", "cuda", *(["executorch"] if HAVE_EXECUTORCH else [])]
ROWS, LONGEST = 30, 32
# Of float32 sums in another order, where an activation on the border of two integers may become the other one.
FLIPPED_STEPS = 2e-2


class Tagger(nn.Module):
    """One block over tokens, with a mask, that gives a dictionary: scores, the tokens' positions, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, 16)
        self.mixer = MambaMixer(MambaConfig(vocab_size=ROWS, d_model=16, n_layer=1, d_state=4))
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        """ids (batch, length) int64, mask (batch, length) float32."""
        hidden = self.embedding(ids) * mask[..., None]
        hidden = hidden + self.mixer(hidden)[0]
        return {"scores": (self.head(hidden) * scale, ids), "kind": "tags", "none": None}


def tokens(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (batch, length), generator=generator)
    return ids, (torch.rand(batch, length, generator=generator) > 0.2).float()


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, 12, 12, generator=torch.Generator().manual_seed(seed))


@functools.cache
def tagger(backend: str) -> Any:
    torch.manual_seed(0)
    quantized = mq_ao.quantize(Tagger().eval(), [tokens(2, 24)], "rtn-w8a8", backend=backend)
    options = Options(max_length=LONGEST) if backend == "executorch" else None
    return quantized, quantized.lower(options=options)


@functools.cache
def vim(backend: str) -> Any:
    torch.manual_seed(0)
    config = VimConfig(image_size=12, patch_size=4, in_channels=2, num_classes=5, d_model=16, n_layer=1, d_state=4)
    quantized = mq_ao.quantize(Vim(config).eval(), [(images(8),)], "rtn-w8a8", backend=backend)
    return quantized, quantized.lower()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def saved(program: Any, backend: str, folder: Path) -> Any:
    """The program, and the same after a while in a file."""
    path = folder / f"m{get_backend(backend).suffix}"
    program.save(path)
    return program, mq_ao.load(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_gives_what_the_module_gives(backend: str, tmp_path: Path) -> None:
    quantized, made = tagger(backend)
    one = backend == "executorch"
    for program in saved(made, backend, tmp_path):
        for batch, length in ((1, 1), (1, 2), (1, 31)) if one else ((1, 1), (3, 1), (1, 7), (4, 40)):
            ids, mask = tokens(batch, length, seed=length)
            with torch.no_grad():
                expected = quantized.converted(ids, mask)
            calls = [
                program(ids, mask),
                program(ids, mask=mask),
                program(mask=mask, ids=ids.int()),
                program(ids.numpy(), mask.clone().requires_grad_()),
                program(ids.t().contiguous().t(), mask.t().contiguous().t()),
            ]
            for got in calls:
                assert got.keys() == expected.keys() and got["kind"] == "tags" and got["none"] is None
                assert relative(got["scores"][0], expected["scores"][0]) < FLIPPED_STEPS
                assert torch.equal(got["scores"][1], ids)
                assert torch.equal(got["scores"][0], calls[0]["scores"][0])
        # A result is not overwritten by the next call.
        kept = calls[0]["scores"][0].clone()
        program(*tokens(batch, length, seed=99))
        assert torch.equal(calls[0]["scores"][0], kept)
    assert sum(made.integer_kernels.values()) > 0 and made.info["recipe"] == "rtn-w8a8" and made.weight_bytes > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_too(backend: str, tmp_path: Path) -> None:
    quantized, made = vim(backend)
    for program in saved(made, backend, tmp_path):
        for batch in (1,) if backend == "executorch" else (1, 2, 5):
            x = images(batch, seed=batch)
            with torch.no_grad():
                assert relative(program(x), quantized.converted(x)) < FLIPPED_STEPS


IDS, MASK = tokens(1, 6)
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((), {}, "ids, mask is missing"),
    ((IDS,), {}, "mask is missing"),
    ((IDS, MASK, 1.0, None), {}, "4 arguments are given"),
    ((IDS, MASK), {"mask": MASK}, "mask is given twice"),
    ((IDS, MASK), {"more": MASK}, "more is no argument of it"),
    (([IDS], MASK), {}, "nested otherwise|got a list"),
    ((IDS, None), {}, "nested otherwise|got a NoneType"),
    ((IDS.float(), MASK), {}, r"takes ids \(.*length\) int64; got float32 of shape \(1, 6\)"),
    ((IDS, MASK.double()), {}, "takes mask .* float32; got float64"),
    ((IDS, MASK.long()), {}, "takes mask .* float32; got int64"),
    ((IDS[0], MASK), {}, r"got shape \(6,\)"),
    ((IDS, MASK[..., None]), {}, r"got shape \(1, 6, 1\)"),
    ((IDS, MASK[:, :5]), {}, "axis 1 of mask is 5 where 6 is needed"),
    ((IDS[:, :0], MASK[:, :0]), {}, "length is 0|not as it was captured for"),
    ((IDS + ROWS, MASK), {}, f"ids holds .*, and the model's embedding has {ROWS} rows"),
    ((IDS - ROWS, MASK), {}, "ids holds -"),
    ((IDS.to("meta"), MASK), {}, "got a Tensor without values"),
    ((IDS, MASK.to_sparse()), {}, "got a Tensor without values"),
    (("ids", MASK), {}, "got a str"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("args", "kwargs", "message"), WRONG)
def test_wrong_arguments_are_refused(backend: str, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        tagger(backend)[1](*args, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 1, 2, 3, 0])] * 2, *[st.sampled_from([1, 2, 9, 9, 0, 33])] * 2),
    dtypes=st.tuples(
        st.sampled_from([torch.int64, torch.uint8, torch.float32]),
        st.sampled_from([torch.float32] * 2 + [torch.float16]),
    ),
    beyond=st.sampled_from([0, 0, 0, 1]),
)
def test_any_call_is_refused_or_right(backend: str, sizes: Any, dtypes: Any, beyond: int) -> None:
    quantized, program = tagger(backend)
    ids, mask = tokens(sizes[0], sizes[2])[0].to(dtypes[0]), tokens(sizes[1], sizes[3])[1].to(dtypes[1])
    ids = ids + beyond * ROWS
    limits = (1, LONGEST) if backend == "executorch" else (99, 99)
    right = (
        sizes[0] == sizes[1]
        and sizes[2] == sizes[3]
        and min(sizes) > 0
        and sizes[0] <= limits[0]
        and sizes[2] <= limits[1]
        and dtypes[0] != torch.float32
        and dtypes[1] == torch.float32
        and not beyond
    )
    try:
        got = program(ids, mask)["scores"][0]
    except MqAoError:
        assert not right
        return
    assert right
    with torch.no_grad():
        assert relative(got, quantized.converted(ids.long(), mask)["scores"][0]) < FLIPPED_STEPS


@pytest.mark.skipif(not HAVE_EXECUTORCH, reason="needs executorch")
def test_executorch_programs_have_a_batch_a_longest_input_and_may_be_portable() -> None:
    program = tagger("executorch")[1]
    with pytest.raises(MqAoError, match="axis 0 of ids is 2 where 1 is needed"):
        program(*tokens(2, 5))
    with pytest.raises(MqAoError, match=f"1 <= length <= {LONGEST}.* length is {LONGEST + 1}"):
        program(*tokens(1, LONGEST + 1))
    quantized = tagger("executorch")[0]
    portable = quantized.lower(options=Options(batch=2, max_length=8, scan=Scan.PORTABLE))
    assert not any("mq_ao" in name for name in portable.integer_kernels)
    ids, mask = tokens(2, 7)
    with torch.no_grad():
        expected = quantized.converted(ids, mask)["scores"][0]
    assert relative(portable(ids, mask)["scores"][0], expected) < FLIPPED_STEPS


class Special(Tagger):
    """Ends with an operator that ExecuTorch does not have."""

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        """See `Tagger`."""
        return {"j0": torch.special.bessel_j0(super().forward(ids, mask, scale)["scores"][0])}


@pytest.mark.skipif(not HAVE_EXECUTORCH, reason="needs executorch")
def test_operators_that_executorch_does_not_have_are_named() -> None:
    torch.manual_seed(0)
    quantized = mq_ao.quantize(Special().eval(), [tokens(2, 24)], "rtn-w8a8", backend="executorch")
    with pytest.raises(MqAoError, match=r"cannot take this model: .*bessel_j0.* quantize for inductor or cuda"):
        quantized.lower()


def test_on_a_gpu_it_compiles_for_all_sizes(tmp_path: Path) -> None:
    from mq_ao.lowering import cuda

    quantized, program = tagger("cuda")
    assert program.mode is cuda.Mode.EAGER and program.device.type == "cpu"
    compiled = program.on("cpu", "default")
    for batch, length in ((2, 9), (1, 3)):
        args = tokens(batch, length)
        with torch.no_grad():
            expected = quantized.converted(*args)["scores"][0]
        assert relative(compiled(*args)["scores"][0], expected) < FLIPPED_STEPS
    program.save(tmp_path / "m.ptc")
    with pytest.raises(MqAoError, match="is not the program of a language model: load it with mq_ao.load"):
        cuda.CudaProgram.load(tmp_path / "m.ptc")
    with pytest.raises(MqAoError, match="unknown mode 'fast'"):
        cuda.load(tmp_path / "m.ptc", "cpu", "fast")


def test_keywords_constants_and_types_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, use_cache=False)
    model = transformers.MambaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    # As a graph it is a module like others: the model itself would become a program with states.
    graph = mq_ao.export(model, (ids,)).module(check_guards=False)
    quantized = mq_ao.quantize(graph, [(ids,)], "rtn-w8a8", backend="cuda")
    for program in saved(quantized.lower(), "cuda", tmp_path):
        got = program(input_ids=ids[:1])
        with torch.no_grad():
            expected = quantized.converted(ids[:1])
        assert type(got) is type(expected)
        assert relative(got.logits, expected.logits) < FLIPPED_STEPS
    # As captured with keywords, and an argument that is no tensor.
    captured = mq_ao.export(model, (), {"input_ids": ids, "use_cache": False}).module(check_guards=False)
    exported, signature = export_module(captured)
    signature = Signature.read(signature.described)
    (tensor,) = signature.bind((), {"use_cache": False, "input_ids": ids})
    assert torch.equal(signature.bind((), {"input_ids": ids})[0], tensor)  # what it was made for may be left out
    with pytest.raises(MqAoError, match="give input_ids, use_cache by name"):
        signature.bind((ids,), {})
    result = signature.restore(exported.module(check_guards=False)(tensor))
    torch.testing.assert_close(result.logits, model(ids, use_cache=False).logits)
    with pytest.raises(MqAoError, match="it was made with False where True is given"):
        signature.bind((), {"use_cache": True, "input_ids": ids})


class Windows(nn.Module):
    """Sums of windows of four."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length)."""
        return x.unflatten(1, (x.shape[1] // 4, 4)).sum(-1)


class FirstTwo(nn.Module):
    """What torch.export takes to be two columns, whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length)."""
        return x[:, :2] * 2


def exported_signature(module: nn.Module, *args: Tensor) -> Signature:
    graph = mq_ao.export(module.eval(), args).module(check_guards=False)
    return Signature.read(export_module(graph)[1].described)


def test_sizes_that_the_graph_rules_out_are_refused() -> None:
    windows = exported_signature(Windows(), torch.ones(2, 8))
    for length in (8, 12, 400):
        windows.bind((torch.ones(1, length),), {})
    for length in (1, 2, 3, 5, 6, 7, 9, 401):
        with pytest.raises(MqAoError, match=r"not as it was captured for: .*x\.shape\[1\]|length is"):
            windows.bind((torch.ones(1, length),), {})
    # One column would be read beyond its end: all shapes in the graph say two.
    first = exported_signature(FirstTwo(), torch.ones(3, 5))
    assert first.least == {"batch": 1, "length": 2}
    with pytest.raises(MqAoError, match="length is 1"):
        first.bind((torch.ones(1, 1),), {})


@pytest.mark.parametrize(
    "text", ["__import__('os')", "size_0_0.real", "x == 1", "max(*size_0_0)", "2.5 < 3", "lambda: 1", "("]
)
def test_guards_are_arithmetic_and_nothing_else(text: str) -> None:
    with pytest.raises(MqAoError, match="which a saved program cannot check"):
        Guard(text).holds([(1,)])


class Counting(Tagger):
    """Keeps a count between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        """See `Tagger`."""
        self.count.add_(1)
        return {**super().forward(ids, mask, scale), "count": self.count * 1}


class Embedded(nn.Module):
    """Takes ids and a value for each token, and gives logits and such a value: no state, though of the same axes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixer, self.head = nn.Embedding(9, 16), Blocks(1), nn.Linear(16, 9)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """ids (batch, length), x (batch, length, 16)."""
        y = self.mixer(self.embedding(ids) + x)
        return self.head(y), y


def test_values_of_tokens_are_no_states() -> None:
    torch.manual_seed(0)
    model = Embedded().eval()
    given = (torch.randint(0, 9, (2, 6)), torch.randn(2, 6, 16))
    assert find_states(mq_ao.export(model, given).module()) is None
    quantized = mq_ao.quantize(model, [given], "rtn-w8a8", backend="cuda")
    assert isinstance(quantized.lower(), ModuleProgram)


class Measuring(Tagger):
    """Gives a size."""

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        """See `Tagger`."""
        return {**super().forward(ids, mask, scale), "length": ids.shape[1]}


def test_modules_that_cannot_be_saved_say_why() -> None:
    torch.manual_seed(0)
    quantized = mq_ao.quantize(Measuring().eval(), [tokens(2, 24)], "rtn-w8a8", backend="cuda")
    with pytest.raises(MqAoError, match="which is no tensor"):
        quantized.lower()
    # `quantize` refuses it before that; a graph of one's own may hold such a buffer.
    graph = mq_ao.export(Counting().eval(), tokens(2, 24)).module()
    with pytest.raises(MqAoError, match="writes to its buffer count: a saved program keeps nothing"):
        refuse_memory(graph)


def test_the_commands_know_them(mq_ao: CommandLine, tmp_path: Path) -> None:
    program = tagger("inductor")[1]
    program.save(tmp_path / "m.pt2")
    shown = mq_ao("inspect", tmp_path / "m.pt2")
    assert shown.code == 0 and "qcausal_conv1d" in shown.out and "ids (batch, length) int64" in shown.out
    assert "is a program without states, and cannot generate yet" in error(
        mq_ao("generate", tmp_path / "m.pt2", "--prompt", "a")
    )
