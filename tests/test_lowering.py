"""The Inductor lowering: integer kernels counted, numerics against the q/dq simulation, programs saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import mq_ao
from mq_ao import MqAoError
from mq_ao.api import capture
from mq_ao.lowering import inductor
from mq_ao.lowering.inductor import InductorProgram
from mq_ao.models import MambaLM, Sampling
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer import QuantizationConfig, w8a8
from mq_ao.recipes import Recipe
from tests.conftest import VOCAB, tokens

# A value on the boundary of two integers may round either way when the float work around it is fused differently:
# one step of one activation. Everything else agrees to float32 rounding.
FLIPPED_STEP = 5e-3


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_every_linear_and_convolution_is_an_integer_kernel(quantized: QuantizedModel) -> None:
    integer = inductor.rewrite(quantized.converted)
    graph, counts = integer.module, integer.kernels
    assert integer.simulated == []
    # Four linears and in_proj's second half in each of two blocks, and the head; one convolution a block.
    assert sum(count for name, count in counts.items() if "linear_packed" in name) == 5 * 2 + 1
    assert counts["mq_ao.qcausal_conv1d.default"] == 2
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("aten.linear" in target or "dequantize" in target for target in targets)
    assert "mq_ao.causal_conv1d.default" not in targets


def test_static_in_proj_writes_the_convolutions_integers_itself(tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    graph = inductor.rewrite(mq_ao.quantize(tiny, calibration, "rtn-w8a8").converted).module
    for conv in graph.graph.find_nodes(op="call_function", target=torch.ops.mq_ao.qcausal_conv1d.default):
        assert conv.args[0].target is torch.ops.mq_ao.linear_packed.default
        assert conv.args[0].args[6] == conv.args[1]  # out_scale is the convolution's input scale


def test_integer_graph_equals_the_simulation(quantized: QuantizedModel, tiny: MambaLM) -> None:
    graph = inductor.rewrite(quantized.converted).module
    ids, states = tokens(2, 19), tiny.initial_states(2)
    with torch.no_grad():
        for got, expected in zip(graph(ids, *states), quantized.converted(ids, *states), strict=True):
            assert relative(got, expected) < FLIPPED_STEP


def test_compiled_program_equals_the_simulation(
    program: InductorProgram, quantized: QuantizedModel, tiny: MambaLM
) -> None:
    assert sum(program.integer_kernels.values()) == 15
    for shape in [(1, 1), (1, 7), (3, 33)]:
        ids, states = tokens(*shape), tiny.initial_states(shape[0])
        with torch.no_grad():
            expected = quantized.converted(ids, *states)
        for got, wanted in zip(program(ids), expected, strict=True):
            assert got.shape == wanted.shape
            assert relative(got, wanted) < FLIPPED_STEP


def test_prefill_then_decode_equals_one_call(program: InductorProgram) -> None:
    ids = tokens(2, 9)
    whole, conv_end, ssm_end = program(ids)
    logits, conv, ssm = program.prefill(ids[:, :5])
    torch.testing.assert_close(logits[:, 0], whole[:, 4], rtol=0, atol=1e-5)
    for index in range(5, 9):
        logits, conv, ssm = program.decode(ids[:, index : index + 1], conv, ssm)
        assert relative(logits[:, 0], whole[:, index]) < FLIPPED_STEP
    assert relative(conv, conv_end) < FLIPPED_STEP
    assert relative(ssm, ssm_end) < FLIPPED_STEP


def test_inputs_are_left_alone_and_may_be_slices(program: InductorProgram) -> None:
    ids = tokens(2, 12)
    logits, conv, ssm = program(ids[:, :11])
    torch.testing.assert_close(logits, program(ids[:, :11].contiguous())[0], rtol=0, atol=0)
    kept = conv.clone(), ssm.clone()
    program.decode(ids[:, 11:], conv, ssm)
    assert torch.equal(conv, kept[0]) and torch.equal(ssm, kept[1])


def test_a_program_loads_in_a_fresh_process(program: InductorProgram, tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt2"
    program.save(path)
    script = (
        "import sys, torch, mq_ao\n"
        "program = mq_ao.load(sys.argv[1])\n"
        "ids = torch.arange(6)[None]\n"
        "torch.save((program(ids)[0], program.generate(ids, 4)), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path / "out")], check=True, timeout=300)
    logits, generated = torch.load(tmp_path / "out", weights_only=True)
    ids = torch.arange(6)[None]
    assert torch.equal(logits, program(ids)[0])
    assert torch.equal(generated, program.generate(ids, 4))


def test_weights_are_in_the_file_and_in_memory_once(program: InductorProgram, tiny: MambaLM, tmp_path: Path) -> None:
    program.save(tmp_path / "tiny.pt2")
    with zipfile.ZipFile(tmp_path / "tiny.pt2") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert program.weight_bytes <= weights < 1.2 * program.weight_bytes
    # int8 weights, and float32 scales, A, D and biases, which weigh much in a model as small as this one.
    fp32 = sum(p.numel() for p in tiny.parameters()) * 4
    assert program.weight_bytes < 0.5 * fp32


def test_generation_is_greedy_by_default_and_repeats_with_a_seed(program: InductorProgram) -> None:
    ids = tokens(2, 4)
    greedy = program.generate(ids, 5)
    assert greedy.shape == (2, 9)
    assert torch.equal(greedy[:, :4], ids)
    assert torch.equal(greedy, program.generate(ids, 5, Sampling(temperature=1.0, top_k=1)))
    draw = Sampling(temperature=1.5, seed=3)
    assert torch.equal(program.generate(ids, 5, draw), program.generate(ids, 5, draw))


def test_torch_compile_of_a_converted_graph(quantized: QuantizedModel, tiny: MambaLM) -> None:
    inputs = (tokens(2, 8), *tiny.initial_states(2))
    compiled = inductor.compiled(quantized.converted, inputs)
    with torch.no_grad():
        assert relative(compiled(*inputs)[0], quantized.converted(*inputs)[0]) < FLIPPED_STEP


def test_a_graph_in_which_nothing_is_quantized_is_refused(tiny: MambaLM) -> None:
    with pytest.raises(MqAoError, match="no integer kernel in the lowered graph"):
        inductor.rewrite(capture(tiny, ()))


def test_lowering_without_a_compiler_says_so_at_once(
    quantized: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MqAoError, match="no C.. compiler found .looked for no-such-compiler.: install g"):
        quantized.lower("inductor")


def test_partly_quantized_graphs_run_the_rest_in_float(tiny: MambaLM, calibration: list[torch.Tensor]) -> None:
    roles = {role: spec for role, spec in w8a8().roles.items() if role.value in ("in_proj", "out_proj")}
    q = mq_ao.quantize(tiny, calibration, Recipe("two-roles", QuantizationConfig(roles)))
    integer = inductor.rewrite(q.converted)
    assert sum(integer.kernels.values()) == 8  # in_proj in two halves, the gate, and out_proj, in two blocks
    ids, states = tokens(1, 11), tiny.initial_states(1)
    with torch.no_grad():
        assert relative(integer.module(ids, *states)[0], q.converted(ids, *states)[0]) < FLIPPED_STEP


def test_what_has_no_integer_kernel_is_named(
    tiny: MambaLM, calibration: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    q = mq_ao.quantize(tiny, calibration)
    head = q.converted.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[-1]
    dequantize = head.args[0]
    dequantize.args = (*dequantize.args[:3], 0, 127, torch.uint8)
    integer = inductor.rewrite(q.converted)
    assert integer.simulated == [head.name]
    assert f"no integer kernel for the quantization of {head.name}" in caplog.text


def test_bad_token_ids_are_refused(program: InductorProgram) -> None:
    with pytest.raises(MqAoError, match=f"outside the vocabulary of {VOCAB} tokens"):
        program(torch.full((1, 3), VOCAB))
    with pytest.raises(MqAoError, match="is empty"):
        program(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(MqAoError, match="must be .batch, length. int64"):
        program(torch.zeros(1, 3))
    with pytest.raises(MqAoError, match="the prompt is empty"):
        program.generate(torch.zeros(1, 0, dtype=torch.int64))


def test_bad_output_paths_are_refused_and_leave_nothing(program: InductorProgram, tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="must end in .pt2"):
        program.save(tmp_path / "model.bin")
    with pytest.raises(MqAoError, match="does not exist"):
        program.save(tmp_path / "missing" / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def _edited(source: Path, target: Path, **changes: object) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("mq_ao.json"):
                data = json.dumps(json.loads(data) | changes).encode()
            new.writestr(info, data)
    return target


def test_files_that_are_not_programs_of_this_version_are_refused(program: InductorProgram, tmp_path: Path) -> None:
    with pytest.raises(MqAoError, match="there is no file"):
        mq_ao.load(tmp_path / "none.pt2")
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(MqAoError, match="is not a program saved by mq_ao"):
        mq_ao.load(text)
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("model/data.txt", "x")
    with pytest.raises(MqAoError, match="is not a program saved by mq_ao"):
        mq_ao.load(other)
    good = tmp_path / "good.pt2"
    program.save(good)
    with pytest.raises(MqAoError, match="was saved for torch 1.0.0"):
        mq_ao.load(_edited(good, tmp_path / "old.pt2", torch="1.0.0"))
    with pytest.raises(MqAoError, match="was saved for cpu SVE, but this is"):
        mq_ao.load(_edited(good, tmp_path / "arm.pt2", cpu="SVE"))
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with pytest.raises(MqAoError, match="is not a program saved by mq_ao"):
        mq_ao.load(cut)
