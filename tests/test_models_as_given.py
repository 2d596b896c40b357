"""Models as people hold them: in half precision, wrapped, compiled, without values, with modes of their own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import compile_float
from mq_ao.capture import import_mamba_ssm
from mq_ao.models import MambaConfig, MambaLM, Vim, VimConfig, demo
from mq_ao.quantizer import MambaQuantizer, w8a8
from tests.blocks import Blocks, X, output
from tests.conftest import tokens

DTYPES = (torch.bfloat16, torch.float16, torch.float64)
BATCHES = [tokens(2, 12, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return Blocks()


def same_as(model: nn.Module, wanted: nn.Module, batches: list[Any], recipe: str = "rtn-w8a8") -> None:
    """Checks that quantizing `model` is quantizing `wanted`."""
    got, expected = mq_ao.quantize(model, batches, recipe), mq_ao.quantize(wanted, batches, recipe)
    assert torch.equal(output(got, *graph_inputs(model, batches)), output(expected, *graph_inputs(model, batches)))


def graph_inputs(model: nn.Module, batches: list[Any]) -> tuple[Tensor, ...]:
    first = batches[0]
    return (
        (first, *model.float().initial_states(len(first)))
        if isinstance(model, MambaLM)
        else (first.float(),)
        if (first.is_floating_point())
        else (first,)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "mambaquant-w8a8"])
def test_a_language_model_of_any_dtype_is_quantized_in_float32(tiny: MambaLM, dtype: torch.dtype, recipe: str) -> None:
    model = copy.deepcopy(tiny).to(dtype)
    before = copy.deepcopy(model.state_dict())
    quantized = mq_ao.quantize(model, BATCHES, recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert model.lm_head.weight is model.backbone.embedding.weight
    name = str(dtype).removeprefix("torch.")
    assert quantized.report().dtype == name
    assert f"the model came in {name}; what is not quantized runs in float32" in str(quantized.report())
    expected = mq_ao.quantize(copy.deepcopy(model).float(), BATCHES, recipe)
    inputs = (tokens(3, 7), *tiny.initial_states(3))
    assert torch.equal(output(quantized, *inputs), output(expected, *inputs))
    assert expected.report().dtype == "float32"
    assert "came in" not in str(expected.report())


def test_programs_of_half_precision_models_run(tiny: MambaLM) -> None:
    model = copy.deepcopy(tiny).bfloat16()
    ids = tokens(2, 9)
    # Graphs for CUDA run here on the operators' references, without minutes of compiling.
    logits = mq_ao.quantize(model, BATCHES, "rtn-w8a8", backend="cuda").lower()(ids)[0]
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        assert (logits - exact(ids)[0]).norm() < 0.06 * exact(ids)[0].norm()  # as of the float32 model in test_api
        torch.testing.assert_close(compile_float(model, "cuda")(ids)[0], exact(ids)[0], rtol=1e-4, atol=1e-5)


def transformers_models() -> list[str]:
    try:
        from tests.test_capture_transformers import MODELS
    except pytest.skip.Exception:
        return []
    return list(MODELS)


@pytest.mark.parametrize("name", transformers_models())
def test_transformers_models_in_half_precision(name: str) -> None:
    from tests.test_capture_transformers import VOCAB, build

    half = build(name).bfloat16()
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    got = mq_ao.quantize(half, [ids], "rtn-w8a8")
    assert torch.equal(output(got, ids), output(mq_ao.quantize(half.float(), [ids], "rtn-w8a8"), ids))


def test_mamba_ssm_in_half_precision() -> None:
    try:
        package = import_mamba_ssm()
    except MqAoError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    mixer = package.Mamba(16, d_state=8).eval()
    same_as(copy.deepcopy(mixer).half(), copy.deepcopy(mixer).half().float(), X)
    with pytest.raises(MqAoError, match="the model is Mamba-3, which is not supported: Mamba and Mamba-2 are"):
        mq_ao.quantize(package.Mamba3(32, d_state=16, headdim=16).eval(), [torch.randn(2, 6, 32)])


def test_vision_models_in_half_precision() -> None:
    torch.manual_seed(0)
    config = VimConfig(image_size=8, patch_size=4, in_channels=1, num_classes=5, d_model=16, n_layer=1)
    model = Vim(config).eval()
    images = [torch.randn(2, 1, 8, 8).half()]
    same_as(copy.deepcopy(model).half(), copy.deepcopy(model).half().float(), images)


def test_what_is_no_parameter_is_converted_too(blocks: Blocks) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = copy.deepcopy(blocks), torch.tensor(0.7)
            self.register_buffer("shift", torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.scale + self.shift)

    model = Scaled().eval().bfloat16()
    model.scale = model.scale.bfloat16()
    wanted = copy.deepcopy(model).float()
    wanted.scale = wanted.scale.float()
    same_as(model, wanted, X)
    assert model.scale.dtype == torch.bfloat16


class Masked(nn.Module):
    """Names its parameter by keyword alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        y = self.inner(x)
        return y * options["mask"][..., None] if "mask" in options else y


class Positional(Masked):
    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(args[0])


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,  # in training mode itself
        torch.compile,
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.Sequential(model).eval(),
        lambda model: Positional(model).eval(),
    ],
)
def test_wrapped_models_are_the_model(blocks: Blocks, wrap: Callable[[nn.Module], nn.Module]) -> None:
    same_as(wrap(copy.deepcopy(blocks)), blocks, X)


def test_unwrapping_is_logged(blocks: Blocks, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mq_ao"):
        mq_ao.export(nn.DataParallel(blocks), (X[0],))
    assert "DataParallel: the Blocks inside is taken" in caplog.text


def test_compiled_parts_are_taken_as_they_were_written(blocks: Blocks) -> None:
    model = copy.deepcopy(blocks)
    model.mixers[0] = torch.compile(model.mixers[0])
    model.mixers[1].compile()
    same_as(model, blocks, X)


def test_keyword_inputs_that_the_signature_does_not_name(blocks: Blocks) -> None:
    mask = torch.tensor([[1.0, 1, 1, 0, 1, 1]]).repeat(2, 1)
    batches = [{"x": x, "mask": mask} for x in X]
    quantized = mq_ao.quantize(Masked(blocks).eval(), batches, "rtn-w8a8")
    got, plain = quantized.converted(x=X[0], mask=mask), mq_ao.quantize(blocks, X, "rtn-w8a8").converted(X[0])
    assert torch.equal(got, plain * mask[..., None])
    assert quantized.converted(x=X[0][:1, :3], mask=mask[:1, :3]).shape == (1, 3, 16)


def test_adapters_are_asked_to_be_merged(blocks: Blocks) -> None:
    class Lora(nn.Linear):
        __module__ = "peft.tuners.lora.layer"  # as the library's own

    model = copy.deepcopy(blocks)
    model.mixers[1].x_proj = Lora(32, 33, bias=False)
    message = r"mixers.1.x_proj \(Lora\) holds adapters: merge them first .*merge_and_unload"
    with pytest.raises(MqAoError, match=message):
        mq_ao.quantize(model.eval(), X)


@pytest.mark.parametrize("model", [None, 3, [1]])
def test_what_is_no_model_is_said(model: Any) -> None:
    with pytest.raises(MqAoError, match="the model is of type .*: give a torch.nn.Module"):
        mq_ao.quantize(model, X)


def test_names_and_folders(tmp_path: Path, tiny: MambaLM) -> None:
    batches = [torch.randint(0, 256, (2, 16))]
    assert mq_ao.quantize("demo", batches, "rtn-w8a8").report().recipe.name == "rtn-w8a8"
    tiny.save_pretrained(tmp_path / "tiny")
    for source in (tmp_path / "tiny", str(tmp_path / "tiny")):
        got = mq_ao.quantize(source, BATCHES, "rtn-w8a8")
        inputs = (BATCHES[0], *tiny.initial_states(2))
        assert torch.equal(output(got, *inputs), output(mq_ao.quantize(tiny, BATCHES, "rtn-w8a8"), *inputs))
    with pytest.raises(MqAoError, match="there is no folder"):
        mq_ao.quantize(tmp_path / "missing", batches)
    assert demo.FOLDER.is_dir()


def as_program(program: ExportedProgram) -> Any:
    return program


def as_module(program: ExportedProgram) -> Any:
    return program.module()


@pytest.mark.parametrize("form", [as_program, as_module])
def test_captured_graphs_are_quantized(tiny: MambaLM, blocks: Blocks, form: Callable[[ExportedProgram], Any]) -> None:
    program = mq_ao.export(tiny, (BATCHES[0], *tiny.initial_states(2)))
    inputs = (BATCHES[0], *tiny.initial_states(2))
    for batches in (BATCHES, [(batch, *tiny.initial_states(2)) for batch in BATCHES], [{"input_ids": BATCHES[0]}]):
        for recipe in ("rtn-w8a8", "mambaquant-w8a8"):
            given = form(program)
            got, again = (mq_ao.quantize(given, batches, recipe) for _ in range(2))
            expected = output(mq_ao.quantize(tiny, batches, recipe), *inputs)
            assert torch.equal(output(got, *inputs), expected)
            assert torch.equal(output(again, *inputs), expected)
    lowered = mq_ao.quantize(form(program), BATCHES, "rtn-w8a8", backend="cuda").lower()
    assert lowered(tokens(1, 5))[0].shape == (1, 5, 256)
    same_as(form(mq_ao.export(blocks, (X[0],))), blocks, X)


def test_graphs_without_our_operators_say_how_to_capture(blocks: Blocks) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    program = torch.export.export(Plain().eval(), (X[0],))
    for given in (program, program.module()):
        with pytest.raises(MqAoError, match=r"capture the model with mq_ao.export"):
            mq_ao.quantize(given, X)
    half = mq_ao.export(copy.deepcopy(blocks).half(), (X[0].half(),))
    with pytest.raises(MqAoError, match=r"captured in torch.float16: give mq_ao.export a model in float32"):
        mq_ao.quantize(half, X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_quantizer_alone_wants_float32(blocks: Blocks, dtype: torch.dtype) -> None:
    program = mq_ao.export(copy.deepcopy(blocks).to(dtype), (X[0].to(dtype),))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(MqAoError, match=rf"mixers.0.in_proj computes in {name}: give mq_ao.export a model in float32"):
        prepare_pt2e(program.module(check_guards=False), MambaQuantizer().set_global(w8a8()))


def test_weights_without_values_and_quantized_ones(blocks: Blocks) -> None:
    with pytest.raises(MqAoError, match="weight mixers.0.A_log is on the meta device, without values: load the check"):
        mq_ao.quantize(copy.deepcopy(blocks).to("meta"), X)
    model = copy.deepcopy(blocks)
    eight = model.mixers[0].in_proj.weight.detach().to(torch.float8_e4m3fn)
    model.mixers[0].in_proj.weight = nn.Parameter(eight, requires_grad=False)
    with pytest.raises(MqAoError, match="mixers.0.in_proj.weight is Parameter torch.float8_e4m3fn: give the float mod"):
        mq_ao.quantize(model, X)


@pytest.mark.parametrize("first", [X[0][:1], X[0][:, :1], X[0][:1, :1]])
def test_one_sequence_and_one_token_in_the_first_batch(blocks: Blocks, first: Tensor) -> None:
    batches = [first, X[1].repeat(2, 2, 1)]
    if first.shape[1] == 1:
        batches[1] = batches[1][:, :1]  # floats of one token may be vectors: their second axis is taken as it is
    quantized = mq_ao.quantize(blocks, batches, "rtn-w8a8")
    assert output(quantized, batches[1][:3]).shape == (3, *batches[1].shape[1:])


@pytest.mark.parametrize("name", ["Mamba2", "Bamba"])
def test_transformers_models_calibrated_on_one_sequence_run_any_batch(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.test_capture_transformers import MODELS, VOCAB, build

    model = build(next(key for key in MODELS if key.startswith(name)))
    ids = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    quantized = mq_ao.quantize(model, [ids[:1], ids], "rtn-w8a8")
    whole, one = output(quantized, ids), output(quantized, ids[1:2])
    torch.testing.assert_close(whole[1:2], one, rtol=1e-4, atol=1e-4)  # sums of other shapes, in another order


def test_a_model_of_one_layer_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=256, d_model=16, n_layer=1)).eval()
    quantized = mq_ao.quantize(model, [tokens(1, 4)], "rtn-w8a8")
    assert output(quantized, tokens(3, 2), *model.initial_states(3)).shape == (3, 2, 256)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_hooks_parametrizations_and_weight_norm(blocks: Blocks) -> None:
    from torch.nn.utils import parametrizations, parametrize

    seen: list[Any] = []
    model = copy.deepcopy(blocks)
    model.mixers[0].register_forward_hook(lambda *args: seen.append(args))
    model.mixers[1].in_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    same_as(model, blocks, X)
    normed, plain = copy.deepcopy(blocks), copy.deepcopy(blocks)
    for other in (normed, plain):
        parametrizations.weight_norm(other.mixers[0].in_proj)
    parametrize.remove_parametrizations(plain.mixers[0].in_proj, "weight")
    same_as(normed, plain, X)


def test_caches_are_left_out() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config).eval()
    assert (
        mq_ao.export(model, (BATCHES[0],), {"use_cache": True}).module()(BATCHES[0], use_cache=False).logits.ndim == 3
    )
    assert mq_ao.quantize(model, [{"input_ids": BATCHES[0], "use_cache": True}], "rtn-w8a8")
    with pytest.raises(MqAoError, match=r"input_ids must be \(batch, length\) int64"):
        mq_ao.quantize(model, [BATCHES[0][0]])
    with pytest.raises(MqAoError, match="outside the vocabulary of 256 tokens"):
        mq_ao.quantize(model, [BATCHES[0] + 256])
